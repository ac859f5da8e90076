//! Dependencies between modules point one way: format → checkpoint, backend → model → quant, eval, analysis, bench →
//! engine → session → cli, tui.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::path::{Path, PathBuf};

/// Modules by level; one may use its own level and those before it.
const LEVELS: [&[&str]; 7] = [
    &["error", "files", "monitor", "size", "format"],
    &["checkpoint", "backend"],
    &["model"],
    &["quant", "eval", "analysis", "bench"],
    &["engine"],
    &["session"],
    &["cli", "tui"],
];

fn level(module: &str) -> Option<usize> {
    LEVELS.iter().position(|modules| modules.contains(&module))
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Modules that a line names behind `crate::` or `strata::`.
fn named(line: &str) -> Vec<String> {
    let code = line.split("//").next().unwrap();
    let word = |rest: &str| rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect::<String>();
    ["crate::", "strata::"].iter().flat_map(|root| code.split(root).skip(1).map(word)).collect()
}

#[test]
fn no_module_uses_one_above_it() {
    let mut files = Vec::new();
    sources(Path::new("src"), &mut files);
    assert!(files.len() > 40);
    let mut wrong = Vec::new();
    for file in files {
        let module = file.components().nth(1).unwrap().as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned();
        if ["lib", "main"].contains(&module.as_str()) {
            continue;
        }
        let own = level(&module).unwrap_or_else(|| panic!("src/{module} has no level: add it to LEVELS"));
        let text = std::fs::read_to_string(&file).unwrap();
        for (number, line) in text.lines().enumerate() {
            for used in named(line) {
                if level(&used).is_some_and(|level| level > own) {
                    wrong.push(format!("{}:{}: {module} uses {used}", file.display(), number + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_check_sees_an_upward_use() {
    assert_eq!(named("use crate::session::Session; // crate::tui"), ["session"]);
    assert!(level("session") > level("engine"));
}
