//! Picks the workbench or a headless command.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // What is divided among threads is divided here, so that results do not depend on how many there are.
    faer::set_global_parallelism(faer::Par::Seq);
    if let Err(error) = color_eyre::install() {
        return cli::fail(&strata::error::Error::run(format!("the error reporter cannot be installed: {error}")));
    }
    let report_panic = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        strata::tui::terminal::restore();
        report_panic(panic);
    }));
    match cli::run(cli::Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::fail(&error),
    }
}
