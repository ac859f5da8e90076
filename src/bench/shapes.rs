//! The published models' shapes.

use std::path::Path;

use crate::checkpoint::{Config, Layout};
use crate::error::{Error, Result};

/// Name and `config.json` of each.
pub const PUBLISHED: [(&str, &str); 4] = [
    ("nemotron-h-8b", include_str!("shapes/nemotron-h-8b.json")),
    ("nemotron-nano-9b-v2", include_str!("shapes/nemotron-nano-9b-v2.json")),
    ("nemotron-3-nano-4b", include_str!("shapes/nemotron-3-nano-4b.json")),
    ("nemotron-3-nano-30b-a3b", include_str!("shapes/nemotron-3-nano-30b-a3b.json")),
];

/// A model's sizes.
pub struct Shape {
    pub name: String,
    pub config: Config,
    pub layout: Layout,
}

impl Shape {
    /// A published shape by name, or that of a `config.json`.
    pub fn find(name: &str) -> Result<Self> {
        let config = match PUBLISHED.iter().find(|(published, _)| *published == name) {
            Some((_, text)) => Config::parse(text)?,
            None if Path::new(name).is_file() => Config::read(Path::new(name))?,
            None => {
                let names = PUBLISHED.map(|(name, _)| name).join(", ");
                return Err(Error::input(format!("there is no shape `{name}`")).hint(format!("give a config.json, or one of {names}")));
            }
        };
        Ok(Self { name: name.to_owned(), layout: Layout::new(&config), config })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_shapes_have_the_published_sizes() {
        for ((name, _), billions) in PUBLISHED.iter().zip([8.10, 8.89, 3.97, 31.6]) {
            let parameters = Shape::find(name).unwrap().layout.parameters() as f64 / 1e9;
            assert!((parameters / billions - 1.0).abs() < 0.01, "{name}: {parameters}");
        }
        assert!(Shape::find("nemotron-h-9000b").is_err_and(|error| error.hint.unwrap().contains("nemotron-h-8b")));
    }
}
