//! Why a plan gives its units the formats that they have: what the formats beside them would change.

use serde::Serialize;

use super::{Cost, Item};
use crate::analysis::sensitivity::UnitLosses;
use crate::format::Format;

/// What one unit takes in a plan, and what its neighbours in format would change.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UnitChoice {
    pub unit: String,
    pub block: usize,
    pub format: Format,
    pub bytes: u64,
    pub kld: f64,
    /// Its loss was measured end to end, not estimated.
    pub measured: bool,
    /// The next cheaper and the next dearer format that the request allows.
    pub cheaper: Option<Exchange>,
    pub dearer: Option<Exchange>,
    /// The request leaves no choice.
    pub pinned: bool,
}

/// Another format of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Exchange {
    pub format: Format,
    /// Bytes and nats that it takes and loses more (or less).
    pub bytes: i64,
    pub kld: f64,
    /// Seconds of an answered token that it takes more, where that is the cost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

impl Exchange {
    /// Nats that a megabyte is worth in this exchange, or a microsecond a token where that is the cost. `None` where it costs
    /// nothing: formats that differ in their activations alone take the same bytes.
    pub fn price(&self) -> Option<f64> {
        let cost = self.seconds.map_or(self.bytes as f64 * 1e-6, |seconds| seconds * 1e6);
        (cost != 0.0).then(|| -self.kld / cost)
    }
}

/// What the units of an item take, and the exchanges with the formats beside theirs.
pub(super) fn explain(item: &Item<'_>, option: usize, cost: &Cost) -> Vec<UnitChoice> {
    let exchange = |unit: &UnitLosses, to: Option<&Format>| {
        let (own, other) = (unit.loss(item.formats[option])?, unit.loss(*to?)?);
        Some(Exchange {
            format: other.format,
            bytes: other.bytes as i64 - own.bytes as i64,
            kld: other.kld - own.kld,
            seconds: cost.seconds(unit, &other).zip(cost.seconds(unit, &own)).map(|(other, own)| other - own),
        })
    };
    let choice = |unit: &&UnitLosses| {
        let own = unit.loss(item.formats[option])?;
        Some(UnitChoice {
            unit: unit.name.clone(),
            block: unit.block,
            format: own.format,
            bytes: own.bytes,
            kld: own.kld,
            measured: own.measured,
            cheaper: exchange(unit, option.checked_sub(1).and_then(|below| item.formats.get(below))),
            dearer: exchange(unit, item.formats.get(option + 1)),
            pinned: item.formats.len() == 1,
        })
    };
    item.units.iter().filter_map(choice).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{layout, losses, request};
    use super::super::{Activations, AllocateRequest, Budget, allocate};

    /// Formats that differ in their activations alone cost the same.
    #[test]
    fn an_exchange_of_equal_bytes_has_no_price() {
        let layout = layout();
        let losses = losses(&layout);
        let any = AllocateRequest { activations: Activations::Any, ..request(&layout, Budget::Bits(4.0)) };
        let found = allocate(&losses, &layout, &any).unwrap();
        let exchanges = || found.units.iter().flat_map(|unit| [unit.cheaper, unit.dearer]).flatten();
        assert!(exchanges().any(|to| to.bytes == 0) && exchanges().any(|to| to.bytes != 0));
        assert!(exchanges().all(|to| to.price().is_none() == (to.bytes == 0)));
    }
}
