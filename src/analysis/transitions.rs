//! Precision transitions: in which form each reader of the residual stream takes it.
//!
//! The stream is float. The norm in front of a block emits what the block's first linears read: int8 codes with a scale a
//! token, or floats; an *edge* is one such reader. Where an edge takes another form than the edge before it, the plan
//! changes precision: a *transition*. What an edge costs is the bytes that the norm writes and the linears read.

use serde::Serialize;

use crate::checkpoint::{BlockSpec, Layout};
use crate::format::{BlockKind, Plan};

/// The form in which an edge carries activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    Float,
    Int8,
}

impl Form {
    /// The word used in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float => "float",
            Self::Int8 => "int8",
        }
    }
}

/// One reader of the residual stream, behind the norm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Edge {
    /// Index of the block; `null` for the head.
    pub block: Option<usize>,
    pub kind: Option<BlockKind>,
    /// The linears that read it, or `router`.
    pub reader: String,
    /// The stream itself is always float.
    pub stream: Form,
    pub reads: Form,
    /// `per token` for int8.
    pub scale: Option<&'static str>,
    /// The operation that emits the form.
    pub fused: &'static str,
    /// Bytes that the norm writes for it, scale included.
    pub bytes_per_token: u64,
    /// Whether it takes another form than the edge before it.
    pub transition: bool,
}

/// The edges of a model under a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Transitions {
    pub edges: Vec<Edge>,
    pub count: usize,
    /// Bytes a token that the edges with a transition take: what the changes of precision cost at most.
    pub bytes_per_token: u64,
}

impl Transitions {
    /// The edges of a model of this `layout` under `plan`. A router reads floats whatever its experts read.
    pub fn of(layout: &Layout, plan: &Plan) -> Self {
        let hidden = layout.embedding.cols as u64;
        let mut edges: Vec<Edge> = Vec::new();
        let mut push = |block: Option<&BlockSpec>, reader: String, reads: Form| {
            // A router stands beside its experts: it does not change what the next block is compared with.
            let router = reader == "router";
            let before = edges.iter().rev().find(|edge: &&Edge| edge.reader != "router").map(|edge| edge.reads);
            edges.push(Edge {
                block: block.map(|block| block.index),
                kind: block.map(|block| block.kind),
                reader,
                stream: Form::Float,
                reads,
                scale: (reads == Form::Int8).then_some("per token"),
                fused: "RMS norm",
                bytes_per_token: if reads == Form::Int8 { hidden + 4 } else { 4 * hidden },
                transition: !router && before.is_some_and(|before| before != reads),
            });
        };
        for block in &layout.blocks {
            let form = |int8: bool| if int8 { Form::Int8 } else { Form::Float };
            for wanted in [Form::Int8, Form::Float] {
                let reads = |name: &str| {
                    form(plan.linear(block.index, &block.linear(name).map_or_else(String::new, |l| l.stem.clone())).quantizes_activations())
                };
                let names: Vec<&str> = block.residual_readers().into_iter().filter(|name| reads(name) == wanted).collect();
                if !names.is_empty() {
                    push(Some(block), together(&names), wanted);
                }
            }
            if block.kind == BlockKind::Moe {
                push(Some(block), "router".into(), Form::Float);
            }
        }
        push(None, layout.head.name.clone(), if plan.head.quantizes_activations() { Form::Int8 } else { Form::Float });
        let changed = || edges.iter().filter(|edge| edge.transition);
        Self { count: changed().count(), bytes_per_token: changed().map(|edge| edge.bytes_per_token).sum(), edges }
    }
}

/// `q_proj, k_proj`; experts as one.
fn together(names: &[&str]) -> String {
    let experts = names.iter().filter(|name| name.starts_with("experts.")).count();
    let mut words: Vec<String> = names.iter().filter(|name| !name.starts_with("experts.")).map(|name| (*name).to_owned()).collect();
    if experts > 0 {
        words.insert(0, format!("{experts} experts"));
    }
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::open;
    use crate::format::{Format, Selector};

    #[test]
    fn edges_follow_the_plan_and_changes_are_counted() {
        let layout = open("demo").unwrap().layout;
        let mut plan = Plan { blocks: vec![Format::W8A8; 12], head: Format::W8A8, ..Plan::unquantized(0) };
        assert_eq!(Transitions::of(&layout, &plan).count, 0);
        plan.set(&Selector::Blocks(3, 4), &layout.kinds(), Format::W4A16);
        let found = Transitions::of(&layout, &plan);
        let changed: Vec<_> = found.edges.iter().filter(|edge| edge.transition).map(|edge| (edge.block, edge.reads)).collect();
        assert_eq!(changed, [(Some(3), Form::Float), (Some(5), Form::Int8)]);
        assert_eq!(found.bytes_per_token, 4 * 256 + 256 + 4);
        assert_eq!(found.edges.last().unwrap().reader, "lm_head");
    }

    #[test]
    fn a_router_reads_floats_beside_its_experts_and_linears_may_differ() {
        let layout = open("tests/golden/moe-latent").unwrap().layout;
        let mut plan = Plan { blocks: vec![Format::W8A8; 4], head: Format::W8A8, ..Plan::unquantized(0) };
        plan.linears.insert("layers.2.mixer.v_proj".into(), Format::W8A16);
        let found = Transitions::of(&layout, &plan);
        let of = |block| {
            found.edges.iter().filter(|edge| edge.block == Some(block)).map(|edge| (edge.reader.as_str(), edge.reads)).collect::<Vec<_>>()
        };
        assert_eq!(of(1), [("shared_experts.up_proj, fc1_latent_proj", Form::Int8), ("router", Form::Float)]);
        assert_eq!(of(2), [("q_proj, k_proj", Form::Int8), ("v_proj", Form::Float)]);
    }
}
