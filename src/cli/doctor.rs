//! `strata doctor`.

use std::io::IsTerminal;

use clap::Args;
use serde_json::{Value, json};
use strata::backend::cpu::int_matmul::Isa;
use strata::backend::cuda::libraries::{Found, HOW_TO_GET, Libraries, show};
use strata::backend::cuda::{driver, nvrtc};
use strata::checkpoint::hub::Hub;
use strata::error::Result;
use strata::eval::memory;
use strata::session::paths;

use super::{Common, output};

#[derive(Args)]
pub struct Doctor {}

impl Doctor {
    #[allow(clippy::unused_self, reason = "every command is run the same way")]
    pub fn run(&self, common: &Common) -> Result<()> {
        let findings = findings();
        if common.json {
            let mut document = json!({ "schema": "strata.doctor/1" });
            for (name, value) in findings {
                document[name.replace(' ', "_")] = value;
            }
            return output::json(&document);
        }
        for (name, value) in findings {
            let text = match value {
                Value::String(text) => text,
                other => other.to_string(),
            };
            output::line(&format!("{name:<18} {text}"))?;
        }
        Ok(())
    }
}

fn findings() -> Vec<(&'static str, Value)> {
    let libraries = Libraries::get();
    let environment = |name: &str| std::env::var(name).unwrap_or_else(|_| "not set".into());
    let data = paths::data_directory();
    let writable = std::fs::create_dir_all(&data).and_then(|()| tempfile::tempfile_in(&data)).is_ok();
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].map(|name| std::env::var(name).unwrap_or_default());
    let unicode = locale.iter().find(|value| !value.is_empty()).is_some_and(|value| value.to_uppercase().contains("UTF"));
    let hub = match Hub::from_env() {
        Ok(hub) if hub.offline => format!("{} (offline: HF_HUB_OFFLINE is set)", hub.home.join("hub").display()),
        Ok(hub) => format!("{} (from {})", hub.home.join("hub").display(), hub.endpoint),
        Err(error) => error.to_string(),
    };
    vec![
        ("version", json!(strata::checkpoint::TOOL)),
        ("processors", json!(std::thread::available_parallelism().map_or(0, usize::from))),
        ("integer kernels", json!(Isa::available().iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))),
        ("memory", json!(memory::total_bytes().map_or_else(|| "unknown".into(), strata::session::report::bytes))),
        ("memory available", json!(memory::available_bytes().map_or_else(|| "unknown".into(), strata::session::report::bytes))),
        ("GPU", json!(gpus())),
        ("GPU driver", json!(library(&libraries.driver))),
        ("NVRTC", json!(library(&libraries.nvrtc))),
        ("cuBLAS", json!(library(&libraries.cublas))),
        ("GPU libraries in", json!(libraries.searched.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(":"))),
        ("kernel cache", json!(nvrtc::cache_directory())),
        ("data folder", json!(format!("{} ({})", data.display(), if writable { "writable" } else { "NOT writable: set XDG_DATA_HOME" }))),
        ("hub cache", json!(hub)),
        ("terminal", json!(environment("TERM"))),
        ("colours", json!(if std::env::var_os("NO_COLOR").is_some() { "off (NO_COLOR)".into() } else { environment("COLORTERM") })),
        ("unicode", json!(if unicode { "yes" } else { "no UTF-8 locale: use --ascii" })),
        ("stdout", json!(if std::io::stdout().is_terminal() { "terminal" } else { "not a terminal" })),
    ]
}

/// The GPUs with what each can be named as, or why there is none.
fn gpus() -> String {
    match driver::devices() {
        Ok(found) if found.is_empty() => "none: the driver shows no GPU".into(),
        Ok(found) => {
            let describe = |(index, gpu): (usize, &driver::Description)| {
                let old = if gpu.arch < driver::ARCH_MINIMUM { ", TOO OLD: sm_80 or newer is needed" } else { "" };
                format!("cuda:{index} {} (sm_{}, {}{old})", gpu.name, gpu.arch, strata::session::report::bytes(gpu.memory))
            };
            found.iter().enumerate().map(describe).collect::<Vec<_>>().join("; ")
        }
        Err(error) => format!("none: {error}"),
    }
}

fn library(found: &std::result::Result<Found, String>) -> String {
    match found {
        Ok(found) => format!("{} (CUDA {})", found.path.display(), show(found.version)),
        Err(why) => format!("not found ({why}); {HOW_TO_GET}"),
    }
}
