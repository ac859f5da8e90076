//! What `llama-perplexity` prints, as a record: perplexity, and with `--kl-divergence` the divergence from its base.

use crate::error::{Error, Result};
use crate::eval::ModelResult;
use crate::eval::result::Evidence;
use crate::eval::statistics::{DivergenceSummary, Perplexity};

use super::super::store::{RECORD_SCHEMA, Record, utc};

/// What the records say made them.
pub const SOURCE: &str = "llama-perplexity";

/// Whether `text` is such an output.
pub fn is_output(text: &str) -> bool {
    text.contains("Final estimate: PPL") || text.contains("====== KL divergence statistics")
}

/// The record of an output, stdout and stderr together or stdout alone; `seconds` since 1970 is when it was written.
pub fn record(text: &str, origin: &str, seconds: u64) -> Result<Record> {
    let lacks = |what: &str| {
        Error::input(format!("{origin} has no `{what}`, which llama-perplexity prints"))
            .hint("keep the whole output: `llama-perplexity … > FILE 2>&1`")
    };
    let perplexity = labelled(text, "Mean PPL(Q)").or_else(|| number(text.split_once("Final estimate: PPL =")?.1));
    let llama_cpp = perplexity.ok_or_else(|| lacks("Final estimate: PPL"))?;
    // "… over 655 chunks, n_ctx=512, batch_size=2048, n_seq=4"
    let (windows, window_tokens) = text
        .lines()
        .find_map(|line| {
            let (before, after) = line.split_once(" chunks, n_ctx=")?;
            Some((before.rsplit(' ').next()?.parse().ok()?, number(after)? as usize))
        })
        .unwrap_or((0, 0));
    let kld = if text.contains("====== KL divergence statistics") {
        let value = |label: &str| labelled(text, label).ok_or_else(|| lacks(label));
        let scored = window_tokens.saturating_sub(1 + window_tokens / 2);
        Some(DivergenceSummary {
            mean: value("Mean    KLD")?,
            median: value("Median  KLD")?,
            p90: value("90.0%   KLD")?,
            p95: value("95.0%   KLD")?,
            p99: value("99.0%   KLD")?,
            p999: value("99.9%   KLD")?,
            max: value("Maximum KLD")?,
            top1: value("Same top p")? / 100.0,
            rms_probability: Some(value("RMS Δp")? / 100.0),
            tokens: windows * scored,
        })
    } else {
        None
    };
    // "llama_model_loader: loaded meta data with 25 key-value pairs and 291 tensors from DIR/FILE.gguf (version GGUF V3"
    let loaded =
        text.lines().find_map(|line| line.split_once("loaded meta data with")?.1.split_once(" tensors from ")?.1.split(" (version").next());
    let model = loaded.unwrap_or(origin).trim().to_owned();
    let file_name = model.rsplit(['/', '\\']).next().unwrap_or(&model);
    let variant = file_name.strip_suffix(".gguf").unwrap_or(file_name).to_owned();
    // "print_info: file size   = 3.83 GiB (4.54 BPW)", "llm_load_print_meta: model size       = 7.95 GiB (8.50 BPW)"
    let size = text
        .lines()
        .find_map(|line| line.split_once("file size   =").or_else(|| line.split_once("model size       =")).map(|(_, rest)| rest));
    let unit = |rest: &str| if rest.contains("GiB") { f64::from(1 << 30) } else { f64::from(1 << 20) };
    let file_bytes = size.and_then(|rest| Some((number(rest)? * unit(rest)) as u64)).unwrap_or(0);
    let bits = size.and_then(|rest| number(rest.split_once('(')?.1)).unwrap_or(0.0);
    let result = ModelResult {
        model,
        variant,
        file_bytes,
        bits_per_weight: bits,
        kld,
        perplexities: Some(Perplexity { gptq: None, llama_cpp, windows, window_tokens }),
        provenance: Evidence {
            tool: SOURCE.into(),
            text: if windows > 0 { format!("{windows} x {window_tokens} tokens") } else { String::new() },
            ..Evidence::default()
        },
        ..ModelResult::default()
    };
    Ok(Record { schema: RECORD_SCHEMA.into(), time: utc(seconds), source: SOURCE.into(), session: None, result })
}

/// The number behind `label` and a colon, at the beginning of a line.
fn labelled(text: &str, label: &str) -> Option<f64> {
    text.lines().find_map(|line| number(line.trim_start().strip_prefix(label)?.trim_start().strip_prefix(':')?))
}

/// The number that `text` begins with.
fn number(text: &str) -> Option<f64> {
    let text = text.trim_start();
    let end = text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '-' | '+' | 'e'))).unwrap_or(text.len());
    text[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The layout of llama.cpp's `tools/perplexity` of 2025 (some lines left out).
    const OUTPUT: &str = "\
llama_model_loader: loaded meta data with 25 key-value pairs and 291 tensors from /models/Nano-Q4_K_M.gguf (version GGUF V3 (latest))
print_info: file size   = 3.50 GiB (4.54 BPW)
kl_divergence: computing over 40 chunks, n_ctx=512, batch_size=2048, n_seq=4
chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1       7.2178 ±    0.2669       0.00412 ±    0.00118       0.00911 ±    0.00041     2.512 ±  0.109 %    96.774 ±  0.553 %

====== Perplexity statistics ======
Mean PPL(Q)                   :   8.966302 ±   0.160270
Mean PPL(base)                :   8.453608 ±   0.150165
Cor(ln(PPL(Q)), ln(PPL(base))):  98.10%

====== KL divergence statistics ======
Mean    KLD:   0.097973 ±   0.002198
Maximum KLD:  20.749897
99.9%   KLD:   4.200683
99.0%   KLD:   1.447031
95.0%   KLD:   0.367780
90.0%   KLD:   0.183454
Median  KLD:   0.024584
10.0%   KLD:   0.000105
Minimum KLD:  -0.000134

====== Token probability statistics ======
Mean    Δp: -1.461 ± 0.065 %
RMS Δp    : 10.455 ± 0.186 %
Same top p: 85.422 ± 0.223 %
";

    #[test]
    fn divergence_perplexity_and_size_are_read() {
        assert!(is_output(OUTPUT));
        let record = record(OUTPUT, "out.txt", 951_827_696).unwrap();
        let ModelResult { model, variant, file_bytes, bits_per_weight, kld, perplexities, .. } = record.result;
        assert_eq!((record.time.as_str(), record.source.as_str()), ("2000-02-29T12:34:56Z", "llama-perplexity"));
        assert_eq!((model.as_str(), variant.as_str()), ("/models/Nano-Q4_K_M.gguf", "Nano-Q4_K_M"));
        assert_eq!((file_bytes, bits_per_weight), (3_758_096_384, 4.54));
        let perplexities = perplexities.unwrap();
        assert_eq!((perplexities.gptq, perplexities.llama_cpp), (None, 8.966_302));
        assert_eq!((perplexities.windows, perplexities.window_tokens), (40, 512));
        let kld = kld.unwrap();
        let found = [kld.mean, kld.median, kld.p90, kld.p95, kld.p99, kld.p999, kld.max];
        assert_eq!(found, [0.097_973, 0.024_584, 0.183_454, 0.367_780, 1.447_031, 4.200_683, 20.749_897]);
        assert!((kld.top1 - 0.85422).abs() < 1e-12 && (kld.rms_probability.unwrap() - 0.10455).abs() < 1e-12);
        assert_eq!(kld.tokens, 40 * 255);
    }

    #[test]
    fn perplexity_alone_is_enough_and_half_a_divergence_is_refused() {
        let alone = "perplexity: calculating perplexity over 655 chunks, n_ctx=512, batch_size=2048, n_seq=4\n\
                     Final estimate: PPL = 7.1881 +/- 0.26543\n";
        let result = record(alone, "runs/base.txt", 0).unwrap().result;
        assert_eq!((result.perplexities.unwrap().llama_cpp, result.kld, result.variant.as_str()), (7.1881, None, "base.txt"));
        let error = record(&OUTPUT.replace("99.9%", "99.8%"), "out.txt", 0).unwrap_err();
        assert!(error.message.contains("out.txt has no `99.9%   KLD`"), "{error}");
        assert!(!is_output("PPL"));
    }
}
