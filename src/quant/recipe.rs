//! Recipes: how to quantize, before it is known for which model. A recipe and a model's layout give a plan.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::observe::Observers;
use crate::checkpoint::Layout;
use crate::error::{Error, Result};
use crate::format::{Activations, BlockKind, CacheFormats, Format, Plan, Selector, SsmActivations, Transform};
use crate::size;

/// Schema of a recipe file.
pub const RECIPE_SCHEMA: &str = "strata.recipe/1";

/// The built-in recipes, as the files that a user could have written.
const BUILT_IN: [&str; 11] = [
    include_str!("recipes/phase1.toml"),
    include_str!("recipes/phase2.toml"),
    include_str!("recipes/phase3.toml"),
    include_str!("recipes/phase3-allocated.toml"),
    include_str!("recipes/fit-24gb.toml"),
    include_str!("recipes/rtn.toml"),
    include_str!("recipes/rtn-w8a8.toml"),
    include_str!("recipes/rtn-w4a8.toml"),
    include_str!("recipes/gptq-w4a16.toml"),
    include_str!("recipes/quamba2-like.toml"),
    include_str!("recipes/mambaquant-like.toml"),
];

/// How weights are rounded to codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Round to nearest, scale = absmax / largest code.
    Rtn,
    /// Round to nearest with the clipped scale that loses least.
    Clip,
    /// GPTQ with clipped scales weighted by the Hessian's diagonal.
    Gptq,
    /// GPTQ of weights that also make good what the quantized blocks before them lost (GPTAQ).
    Gptaq,
}

impl Method {
    /// The word used in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Clip => "clip",
            Self::Gptq => "gptq",
            Self::Gptaq => "gptaq",
        }
    }

    /// Whether it rounds with the Hessians of what linears read.
    pub fn uses_hessians(self) -> bool {
        matches!(self, Self::Gptq | Self::Gptaq)
    }
}

/// What is done to weights, formats apart: transforms, then rounding.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Steps {
    pub transforms: Vec<Transform>,
    pub method: Method,
    pub activations: Activations,
    /// How static scales of activations are found.
    pub observers: Observers,
    pub cache: CacheFormats,
}

impl Steps {
    /// With run-time scales, float internals and float caches.
    pub fn new(transforms: Vec<Transform>, method: Method) -> Self {
        let (activations, cache) = (Activations::default(), CacheFormats::default());
        Self { transforms, method, activations, observers: Observers::default(), cache }
    }

    /// How the inside of state-space mixers is rounded, with all that its scales depend on.
    pub fn internals(&self) -> Internals {
        let ssm = self.activations.ssm;
        Internals { ssm, observers: (ssm == SsmActivations::Int8Static).then_some(Observers { linears: 100.0, ..self.observers }) }
    }
}

/// The inside of state-space mixers whose block reads int8.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Internals {
    pub ssm: SsmActivations,
    /// How their scales are found where they are static.
    pub observers: Option<Observers>,
}

/// Formats by kind of block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Formats {
    pub ssm: Format,
    pub mlp: Format,
    pub attention: Format,
    pub moe: Format,
    pub embedding: Format,
    pub head: Format,
}

/// Formats by measurement: which may be used, and what the plan may take. Without a budget it takes no more bytes than the
/// recipe's own formats would.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllocateSpec {
    pub formats: Vec<Format>,
    /// Stored bits a weight of the blocks' linears.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<f64>,
    /// Bytes of the whole model, as people write them: `6GiB`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// The smallest plan that is predicted to lose at most so many nats a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kld: Option<f64>,
    /// A GPU whose memory the model has to fit into, with `context` tokens in its caches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
}

impl AllocateSpec {
    /// With this budget of bits in place of its own.
    #[must_use]
    pub fn with_bits(self, bits: f64) -> Self {
        Self { formats: self.formats, bits: Some(bits), ..Self::default() }
    }

    /// An error where it has two budgets, or one that cannot be read.
    fn check(&self) -> Result<()> {
        let given =
            [("bits", self.bits.is_some()), ("size", self.size.is_some()), ("kld", self.kld.is_some()), ("gpu", self.gpu.is_some())];
        let given: Vec<&str> = given.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect();
        if given.len() > 1 {
            return Err(Error::input(format!("[allocate] has the budgets {}", given.join(" and "))).hint("keep one of them"));
        }
        self.size.as_deref().map_or(Ok(()), |text| size::parse(text).map(drop))
    }
}

/// How to quantize.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    pub schema: String,
    pub name: String,
    #[serde(default)]
    pub description: String,
    pub method: Method,
    #[serde(default)]
    pub transforms: Vec<Transform>,
    pub formats: Formats,
    /// Formats of the blocks are found by measurement, within the bytes of `formats` or a budget of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocate: Option<AllocateSpec>,
    /// Where formats read int8.
    #[serde(default)]
    pub activations: Activations,
    #[serde(default)]
    pub observers: Observers,
    #[serde(default)]
    pub cache: CacheFormats,
}

/// A rule that changes a recipe's plan: what `match` means gets `format`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    #[serde(rename = "match")]
    pub selector: Selector,
    pub format: Format,
}

impl Recipe {
    /// What the recipe does to weights, formats apart.
    pub fn steps(&self) -> Steps {
        let Self { activations, observers, cache, .. } = *self;
        Steps { activations, observers, cache, ..Steps::new(self.transforms.clone(), self.method) }
    }

    /// Names and descriptions of the built-in recipes.
    pub fn built_in() -> Result<Vec<Self>> {
        BUILT_IN.iter().map(|text| Self::parse(text, "built-in recipe")).collect()
    }

    /// The recipe that `text` names: a built-in one, or a file.
    pub fn find(text: &str) -> Result<Self> {
        let built_in = Self::built_in()?;
        if let Some(recipe) = built_in.iter().find(|recipe| recipe.name == text) {
            return Ok(recipe.clone());
        }
        let path = Path::new(text);
        if !path.is_file() {
            let names = built_in.iter().map(|recipe| recipe.name.as_str()).collect::<Vec<_>>().join(", ");
            return Err(Error::input(format!("unknown recipe `{text}`"))
                .hint(format!("the built-in recipes are {names}; a recipe file's path works too")));
        }
        let contents = std::fs::read_to_string(path).map_err(|error| Error::io("reading", path, &error))?;
        Self::parse(&contents, text)
    }

    /// Parses a recipe file; `origin` is named in errors.
    pub fn parse(text: &str, origin: &str) -> Result<Self> {
        let hint = "docs/sessions.md shows a recipe file and its keys, docs/methods.md lists the transforms";
        let recipe: Self = toml::from_str(text).map_err(|error| Error::toml(origin, text, &error).hint(hint))?;
        if recipe.schema != RECIPE_SCHEMA {
            return Err(Error::input(format!("{origin} has schema `{}`, and this strata reads `{RECIPE_SCHEMA}`", recipe.schema))
                .hint(format!("begin a recipe file with schema = \"{RECIPE_SCHEMA}\"")));
        }
        recipe.observers.check().map_err(|error| error.context(origin))?;
        recipe.allocate.as_ref().map_or(Ok(()), AllocateSpec::check).map_err(|error| error.context(origin))?;
        Ok(recipe)
    }

    /// The plan for a model of this `layout`, with `overrides` applied in order; those that name linears go before those
    /// that name blocks. An override that meets nothing, or that contradicts another one, is an error.
    pub fn plan(&self, layout: &Layout, overrides: &[Override]) -> Result<Plan> {
        let formats = &self.formats;
        let kinds = layout.kinds();
        let by_kind = |kind: &BlockKind| match kind {
            BlockKind::Ssm => formats.ssm,
            BlockKind::Mlp => formats.mlp,
            BlockKind::Attention => formats.attention,
            BlockKind::Moe => formats.moe,
        };
        let mut plan =
            Plan { embedding: Format::W16A16, head: formats.head, blocks: kinds.iter().map(by_kind).collect(), ..Plan::unquantized(0) };
        plan.set(&Selector::Embedding, &kinds, formats.embedding);
        for (index, rule) in overrides.iter().enumerate() {
            if let Some(other) = overrides[..index].iter().find(|other| other.selector == rule.selector && other.format != rule.format) {
                return Err(Error::input(format!("overrides give `{}` both {} and {}", rule.selector, other.format, rule.format))
                    .hint("keep one of the two"));
            }
            if let Selector::Blocks(_, last) = rule.selector
                && last >= kinds.len()
            {
                return Err(Error::input(format!(
                    "override `{}` names block {last}, and the model has blocks 0 to {}",
                    rule.selector,
                    kinds.len() - 1
                ))
                .hint("blocks are counted from 0; `strata analyze` lists them"));
            }
            if matches!(rule.selector, Selector::Name(_)) {
                continue;
            }
            if plan.set(&rule.selector, &kinds, rule.format) == 0 {
                return Err(Error::input(format!("override `{}` matches no block of the model", rule.selector))
                    .hint("`strata analyze` lists the kinds and numbers of its blocks"));
            }
        }
        set_linears(&mut plan, layout, overrides)?;
        Ok(plan)
    }
}

/// Applies the overrides that name linears to a plan whose blocks have their formats.
fn set_linears(plan: &mut Plan, layout: &Layout, overrides: &[Override]) -> Result<()> {
    let mut named: BTreeMap<String, (usize, &Override)> = BTreeMap::new();
    for rule in overrides {
        let Selector::Name(pattern) = &rule.selector else { continue };
        let met = layout.named(pattern);
        if met.is_empty() {
            let names: BTreeSet<&str> =
                layout.blocks.iter().flat_map(|block| &block.linears).filter_map(|linear| linear.name.rsplit('.').next()).collect();
            let names = names.into_iter().collect::<Vec<_>>().join(", ");
            return Err(Error::input(format!("override `{}` matches no linear of the model", rule.selector))
                .hint(format!("its linears are {names}, slices of in_proj are called in_proj.B, experts experts.3.up_proj")));
        }
        for (name, block) in met {
            if let Some((_, other)) = named.get(&name)
                && other.format != rule.format
            {
                return Err(Error::input(format!(
                    "overrides `{}` and `{}` give `{name}` both {} and {}",
                    other.selector, rule.selector, other.format, rule.format
                ))
                .hint("make the patterns match different linears"));
            }
            named.insert(name, (block, rule));
        }
    }
    plan.linears = named.iter().map(|(name, (_, rule))| (name.clone(), rule.format)).collect();
    for linear in layout.blocks.iter().flat_map(|block| block.linears.iter().map(move |linear| (block.index, linear))) {
        let (block, linear) = linear;
        let whole = plan.linear(block, &linear.stem);
        for slice in linear.slices.iter().filter(|slice| !slice.name.is_empty()) {
            let format = plan.slice(block, &linear.stem, slice.name);
            // Slices read one input; those that stay in float read its float form.
            if format.weight_bits() < 16 && whole.weight_bits() < 16 && format.activation_bits() != whole.activation_bits() {
                return Err(Error::input(format!(
                    "slice `{}.{}` would be {format} in a linear that is {whole}: the slices of a linear read the same activations",
                    linear.stem, slice.name
                ))
                .hint("give the slice a format with the linear's activation bits, or the whole linear another format"));
            }
            if format == whole {
                plan.linears.remove(&format!("{}.{}", linear.stem, slice.name));
            }
        }
        if whole == plan.blocks[block] {
            plan.linears.remove(&linear.stem);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_recipes_are_readable_and_named_as_their_files() {
        let names: Vec<String> = Recipe::built_in().unwrap().into_iter().map(|recipe| recipe.name).collect();
        let expected = ["phase1", "phase2", "phase3", "phase3-allocated", "fit-24gb", "rtn", "rtn-w8a8", "rtn-w4a8", "gptq-w4a16"];
        assert_eq!(names, [&expected[..], &["quamba2-like", "mambaquant-like"]].concat());
        assert!(Recipe::find("phase9").unwrap_err().hint.unwrap().contains("phase1, phase2, phase3"));
    }

    #[test]
    fn names_reach_linears_and_slices_and_go_before_blocks() {
        let layout = crate::checkpoint::open("demo").unwrap().layout;
        let recipe = Recipe::find("phase2").unwrap();
        let rule = |selector: &str, format| Override { selector: selector.parse().unwrap(), format };
        let rules = [
            rule("name:down_proj", Format::W8A8),
            rule("name:layers.0.mixer.in_proj.B", Format::W8A8),
            rule("kind:mlp", Format::W3A8),
            rule("name:layers.2.*", Format::W4A8),
        ];
        let plan = recipe.plan(&layout, &rules).unwrap();
        let mlp = layout.kinds().iter().position(|kind| *kind == BlockKind::Mlp).unwrap();
        assert_eq!(plan.linear(mlp, &format!("layers.{mlp}.mixer.down_proj")), Format::W8A8);
        assert_eq!(plan.linear(mlp, &format!("layers.{mlp}.mixer.up_proj")), Format::W3A8);
        let slices = ["z", "B", "dt"].map(|slice| plan.slice(0, "layers.0.mixer.in_proj", slice));
        assert_eq!(slices, [Format::W4A8, Format::W8A8, Format::W4A8]);
        assert!(plan.linears.keys().all(|name| !name.starts_with("layers.2.")), "what the block has anyway is not listed");
        let text = toml::to_string(&plan).unwrap();
        assert_eq!(toml::from_str::<Plan>(&text).unwrap(), plan);
    }

    #[test]
    fn overrides_change_the_plan_and_contradictions_are_refused() {
        let layout = crate::checkpoint::open("demo").unwrap().layout;
        let recipe = Recipe::find("phase3").unwrap();
        let rule = |selector: &str, format| Override { selector: selector.parse().unwrap(), format };
        let plan = recipe.plan(&layout, &[rule("kind:ssm", Format::W8A8), rule("block:0", Format::W16A16)]).unwrap();
        assert_eq!((plan.blocks[0], plan.blocks[2]), (Format::W16A16, Format::W8A8));
        for (rules, expected) in [
            (vec![rule("block:0", Format::W8A8), rule("block:0", Format::W4A8)], "both w8a8 and w4a8"),
            (vec![rule("kind:moe", Format::W8A8)], "matches no block"),
            (vec![rule("block:3-99", Format::W8A8)], "block 99"),
            (vec![rule("name:*.gate_proj", Format::W8A8)], "matches no linear"),
            (
                vec![rule("name:layers.0.*", Format::W8A8), rule("name:in_proj", Format::W4A16)],
                "`layers.0.mixer.in_proj` both w8a8 and w4a16",
            ),
            (vec![rule("name:in_proj.B", Format::W8A16)], "read the same activations"),
        ] {
            assert!(recipe.plan(&layout, &rules).unwrap_err().message.contains(expected));
        }
    }
}
