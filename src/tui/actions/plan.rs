//! How the plan is shown: the GPU that costs are predicted for, the variant beside it.

use super::super::message::Effect;
use super::super::popups::Choose;
use super::super::state::State;
use crate::analysis::Gpu;
use crate::session::report;

/// Chooses the GPU that costs are predicted for.
pub fn gpu(state: &mut State) -> Vec<Effect> {
    let detail = |gpu: &Gpu| {
        format!(
            "{} GB  {:.0} GB/s  int8 {:.0} TOPS  bf16 {:.0} TFLOPS",
            (gpu.memory_bytes as f64 / f64::from(1 << 30)).round(),
            gpu.bandwidth / 1e9,
            gpu.int8_ops / 1e12,
            gpu.bf16_ops / 1e12
        )
    };
    let items = Gpu::ALL.iter().map(|gpu| (gpu.name.to_owned(), detail(gpu))).collect();
    let selected = Gpu::ALL.iter().position(|gpu| gpu.name == state.plan.gpu.name).unwrap_or(0);
    state.popups.push(Choose::popup("Predict for", items, selected, |state, index| {
        state.plan.gpu = Gpu::ALL[index];
        state.say(format!("{}: {}", state.plan.gpu.name, state.plan.gpu.source));
        Vec::new()
    }));
    Vec::new()
}

/// Puts another variant's plan beside the current one, or takes it away.
pub fn beside(state: &mut State) -> Vec<Effect> {
    if state.plan.beside.take().is_some() {
        return Vec::new();
    }
    let current = state.document.current();
    let others: Vec<String> =
        state.document.drafts.iter().enumerate().filter(|(index, _)| *index != current).map(|(_, draft)| draft.name.clone()).collect();
    if let [only] = &others[..] {
        state.plan.beside = Some(only.clone());
        return Vec::new();
    }
    let bytes = |name: &String| {
        let draft = state.document.drafts.iter().find(|draft| draft.name == *name);
        draft.map_or_else(String::new, |draft| format!("~{}", report::bytes(state.document.footprint.linear_bytes(state.plan_of(draft)))))
    };
    let items = others.iter().map(|name| (name.clone(), bytes(name))).collect();
    state.popups.push(Choose::popup("Put beside it the plan of", items, 0, move |state, index| {
        state.plan.beside = Some(others[index].clone());
        Vec::new()
    }));
    Vec::new()
}
