//! Picks the workbench or a headless command.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
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
