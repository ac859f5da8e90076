//! What the models of one evaluation read, as tokens: the requests of every task and the text. Encoded once for all models
//! that have the same tokenizer. Start with [`Encoded::of`].

use tokenizers::Tokenizer;

use super::run::EvaluateRequest;
use super::tasks::{Question, Rows, Task};
use super::text;
use crate::checkpoint::Checkpoint;
use crate::error::Result;

/// A continuation to be scored: the model reads `input`, and its last outputs predict `continuation`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Request {
    pub input: Vec<u32>,
    pub continuation: Vec<u32>,
}

impl Request {
    /// Tokens of the continuation that are predicted from `input`: all, unless it fills the model by itself.
    pub fn scored(&self) -> usize {
        self.continuation.len().min(self.input.len())
    }
}

/// The requests of a task, question by question and choice by choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskRequests {
    pub requests: Vec<Request>,
    /// Those whose context was cut from the left to fit the model.
    pub truncated: usize,
}

/// Everything that an evaluation has a model read.
pub struct Encoded {
    key: Key,
    /// In the order of the tasks asked for.
    pub tasks: Vec<TaskRequests>,
    /// Windows of the text, for perplexity and divergence.
    pub windows: Vec<Vec<u32>>,
    /// The text as `llama-perplexity` reads it.
    pub chunks: Vec<Vec<u32>>,
    /// The beginning of the text, which variants with rounded caches decode.
    pub decoded: Vec<u32>,
}

/// What of a model decides its tokens.
#[derive(PartialEq)]
struct Key {
    tokenizer: Option<Vec<u8>>,
    vocabulary: usize,
    max_tokens: usize,
}

impl Key {
    fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let (vocabulary, max_tokens) = (checkpoint.config.vocab_size, checkpoint.config.max_positions);
        Ok(Self { tokenizer: checkpoint.companion("tokenizer.json")?, vocabulary, max_tokens })
    }
}

impl Encoded {
    /// The rows and the text as `checkpoint` reads them.
    pub fn of(checkpoint: &Checkpoint, request: &EvaluateRequest, questions: &[(Task, Rows)], text: Option<&str>) -> Result<Self> {
        let key = Key::of(checkpoint)?;
        let mut encoded = Self { key, tasks: Vec::new(), windows: Vec::new(), chunks: Vec::new(), decoded: Vec::new() };
        if questions.is_empty() && text.is_none() {
            return Ok(encoded);
        }
        let tokenizer = checkpoint.tokenizer()?;
        let encode = |(_, rows): &(Task, Rows)| TaskRequests::of(&tokenizer, &rows.questions, checkpoint.config.max_positions);
        encoded.tasks = questions.iter().map(encode).collect::<Result<_>>()?;
        if let Some(text) = text {
            let mut tokens = text::tokenize(&tokenizer, text)?;
            encoded.windows = text::windows(&tokens, request.windows, request.window_tokens)?;
            encoded.chunks = text::chunks(&tokenizer, text, request.windows, request.window_tokens)?;
            tokens.truncate(request.decode_tokens);
            encoded.decoded = tokens;
        }
        Ok(encoded)
    }

    /// Whether `checkpoint` reads the same tokens.
    pub fn serves(&self, checkpoint: &Checkpoint) -> Result<bool> {
        Ok(self.key == Key::of(checkpoint)?)
    }
}

impl TaskRequests {
    fn of(tokenizer: &Tokenizer, questions: &[Question], max_tokens: usize) -> Result<Self> {
        let mut encoded = Self { requests: Vec::new(), truncated: 0 };
        for (context, continuation) in questions.iter().flat_map(|question| &question.requests) {
            let (request, cut) = encode_pair(tokenizer, context, continuation, max_tokens)?;
            encoded.truncated += usize::from(cut);
            encoded.requests.push(request);
        }
        Ok(encoded)
    }
}

/// The harness's `_encode_pair`: spaces at the end of the context move to the continuation, whose tokens are those of
/// the whole beyond the context's length. What is read is, as in its `_loglikelihood_tokens`, the last `max_tokens` + 1
/// tokens of both but the very last; says whether that cuts the context.
fn encode_pair(tokenizer: &Tokenizer, context: &str, continuation: &str, max_tokens: usize) -> Result<(Request, bool)> {
    let mut tokens = text::encode(tokenizer, context.trim_end(), true)?;
    let whole = text::encode(tokenizer, &format!("{context}{continuation}"), true)?;
    let continuation = whole[tokens.len().min(whole.len())..].to_vec();
    tokens.extend(&continuation);
    tokens.pop();
    let cut = tokens.len().saturating_sub(max_tokens);
    Ok((Request { input: tokens.split_off(cut), continuation }, cut > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        crate::checkpoint::open("demo").unwrap().tokenizer().unwrap()
    }

    #[test]
    fn models_that_read_the_same_tokens_share_them() {
        let mut demo = crate::checkpoint::open("demo").unwrap();
        let questions = [(Task::Piqa, Rows { questions: Task::Piqa.embedded().unwrap().questions[..2].to_vec(), skipped: 0 })];
        let request = EvaluateRequest { windows: 2, window_tokens: 16, decode_tokens: 5, ..EvaluateRequest::default() };
        let encoded = Encoded::of(&demo, &request, &questions, Some(crate::checkpoint::DEMO_HELDOUT)).unwrap();
        assert_eq!((encoded.tasks[0].requests.len(), encoded.windows.len(), encoded.chunks.len()), (4, 2, 2));
        assert_eq!(encoded.decoded, encoded.windows[0][..5]);
        // The whole text is one stream: its second chunk begins with the beginning of sequence, too.
        assert_eq!(encoded.chunks[1][0], encoded.chunks[0][0]);
        assert!(encoded.serves(&demo).unwrap());
        demo.config.max_positions = 16;
        assert!(!encoded.serves(&demo).unwrap(), "contexts are cut elsewhere");
    }

    #[test]
    fn spaces_at_the_end_of_a_context_are_scored_with_the_continuation() {
        let tokenizer = tokenizer();
        let encode = |text: &str| text::encode(&tokenizer, text, true).unwrap();
        let (request, cut) = encode_pair(&tokenizer, "Question: What does a cow eat?\nAnswer: ", " grass", usize::MAX).unwrap();
        let (context, whole) =
            (encode("Question: What does a cow eat?\nAnswer:"), encode("Question: What does a cow eat?\nAnswer:  grass"));
        assert_eq!(request.input, whole[..whole.len() - 1], "it begins with the tokenizer's beginning of sequence");
        assert_eq!((&request.continuation[..], cut), (&whole[context.len()..], false));
        assert!(request.continuation.len() > encode_pair(&tokenizer, "Answer:", " grass", usize::MAX).unwrap().0.continuation.len());
    }

    /// `(context_enc + continuation_enc)[-(max_length + 1):][:-1]` of lm-evaluation-harness 0.4.13.
    #[test]
    fn a_request_longer_than_the_model_loses_the_beginning_of_its_context() {
        let tokenizer = tokenizer();
        let pair =
            |max_tokens| encode_pair(&tokenizer, "Question: How do you cut bread?\nAnswer:", " Use a knife to cut bread.", max_tokens);
        let (whole, cut) = pair(usize::MAX).unwrap();
        let (length, scored) = (whole.input.len(), whole.continuation.len());
        assert!(!cut && length > scored + 4);
        // One token more than the model takes is no reason to cut: the last one is predicted and not read.
        assert_eq!(pair(length).unwrap(), (whole.clone(), false));
        for max_tokens in [length - 1, scored + 1, scored] {
            let (request, cut) = pair(max_tokens).unwrap();
            assert!(cut);
            assert_eq!(request.input, whole.input[length - max_tokens..]);
            assert_eq!(request.continuation, whole.continuation);
            assert_eq!(request.scored(), scored);
        }
        // A continuation that fills the model by itself is scored as far as it has a token in front.
        assert_eq!(pair(scored - 2).unwrap().0.scored(), scored - 2);
    }
}
