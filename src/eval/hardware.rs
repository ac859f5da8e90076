//! What figures were measured on: the processor, and the versions of the libraries that compute.

use std::collections::BTreeMap;

/// Libraries whose version may change a figure.
const LIBRARIES: [&str; 6] = ["candle-core", "faer", "gemm", "half", "rayon", "tokenizers"];

/// The processor's name as the system gives it.
pub fn processor() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim().to_owned()));
    name.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// Processors that this process may run on.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Versions of the libraries that compute, as this program was built with them.
pub fn libraries() -> BTreeMap<String, String> {
    let lines = include_str!("../../Cargo.lock").lines();
    let fields = lines.filter_map(|line| line.split_once(" = ").map(|(key, value)| (key, value.trim_matches('"'))));
    let mut name = "";
    let mut found = BTreeMap::new();
    for (key, value) in fields {
        match key {
            "name" => name = value,
            "version" if LIBRARIES.contains(&name) => {
                found.insert(name.to_owned(), value.to_owned());
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_library_has_a_version() {
        let found = libraries();
        assert!(LIBRARIES.iter().all(|name| found[*name].split('.').count() == 3), "{found:?}");
        assert!(!processor().is_empty() && cores() > 0);
    }
}
