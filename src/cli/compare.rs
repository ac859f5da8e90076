//! `strata compare`.

use clap::Args;
use strata::error::{Error, Result};

use super::Common;
use super::eval::{Measure, name};

#[derive(Args)]
pub struct Compare {
    /// The unquantized model.
    model: String,
    /// Variants of it.
    #[arg(required = true)]
    variants: Vec<String>,
    #[command(flatten)]
    measure: Measure,
}

impl Compare {
    pub fn run(&self, common: &Common) -> Result<()> {
        let mut request = self.measure.request(common.host_memory)?;
        let base = name(&self.model)?;
        if base.name != "base" {
            return Err(
                Error::input(format!("{} is quantized itself", self.model)).hint("name the original checkpoint first, then its variants")
            );
        }
        request.reference = Some(base);
        request.models = self.variants.iter().map(|path| name(path)).collect::<Result<_>>()?;
        self.measure.evaluate(request, common)
    }
}
