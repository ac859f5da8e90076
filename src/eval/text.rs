//! Text to token windows.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// Reads a UTF-8 text file.
pub fn read(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|error| Error::io("reading", path, &error))?;
    String::from_utf8(bytes).map_err(|error| {
        Error::input(format!("{} is not UTF-8: byte {} is not part of a character", path.display(), error.utf8_error().valid_up_to()))
            .hint("convert the file to UTF-8")
    })
}

/// The tokens of every document of `text` (documents are separated by blank lines), each with the tokenizer's own
/// beginning of sequence, one after another.
pub fn tokenize(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let documents: Vec<&str> = text.split("\n\n").map(str::trim).filter(|document| !document.is_empty()).collect();
    let mut tokens = Vec::new();
    for document in documents {
        tokens.extend(encode(tokenizer, document, true)?);
    }
    Ok(tokens)
}

/// The first `count` chunks of `length` tokens as `llama-perplexity` reads them: the whole text is one stream of tokens, and the
/// first of each chunk gives its place to the beginning of sequence, where the tokenizer adds one.
pub fn chunks(tokenizer: &Tokenizer, text: &str, count: usize, length: usize) -> Result<Vec<Vec<u32>>> {
    // Its `--file` leaves out a line break at the end.
    let tokens = encode(tokenizer, text.strip_suffix('\n').unwrap_or(text), true)?;
    let mut chunks = windows(&tokens, count, length)?;
    if let Some(begin) = encode(tokenizer, "", true)?.first() {
        for chunk in &mut chunks {
            chunk[0] = *begin;
        }
    }
    Ok(chunks)
}

/// Token ids of `text`, with what the tokenizer's post-processor adds when `special` is set.
pub fn encode(tokenizer: &Tokenizer, text: &str, special: bool) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode_fast(text, special).map_err(|error| Error::input(format!("a text cannot be tokenized: {error}")))?;
    Ok(encoding.get_ids().to_vec())
}

/// The first `count` windows of `length` tokens; fewer when the text is shorter, an error when there is none.
pub fn windows(tokens: &[u32], count: usize, length: usize) -> Result<Vec<Vec<u32>>> {
    let windows: Vec<Vec<u32>> = tokens.chunks_exact(length).take(count).map(<[u32]>::to_vec).collect();
    if windows.is_empty() {
        return Err(Error::input(format!("the text has {} tokens, fewer than one window of {length}", tokens.len()))
            .hint("give a longer text or a shorter window"));
    }
    Ok(windows)
}
