//! Numbers of bytes as people write them.

use crate::error::{Error, Result};

/// Bytes from `800MB`, `6 GiB`, `1.5e9`: units of 1000 (kB, MB, GB, TB) or of 1024 (KiB, MiB, GiB, TiB), in any case.
pub fn parse(text: &str) -> Result<u64> {
    let text = text.trim();
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).trim_end();
    let factor = match text[number.len()..].trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => f64::from(1 << 20),
        "gib" => f64::from(1 << 30),
        "tib" => f64::from(1 << 30) * 1024.0,
        _ => f64::NAN,
    };
    match number.parse::<f64>() {
        Ok(number) if number > 0.0 && (number * factor).is_finite() => Ok((number * factor) as u64),
        _ => Err(Error::input(format!("`{text}` is not a size such as 6GiB, 900MB or 1.5e9"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1000_and_1024() {
        for (text, bytes) in [("6GiB", 6 << 30), ("1.5 MB", 1_500_000), ("4096", 4096), ("2kib", 2048), ("1.5e9", 1_500_000_000)] {
            assert_eq!(parse(text).unwrap(), bytes, "{text}");
        }
        for wrong in ["", "six", "6 parsecs", "1.2.3GB", "0", "-1GB", "GiB"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
