//! Multiple-choice knapsack: one option for each item, so that the sum of losses is least within a cost.
//!
//! [`Front::solve`] answers every budget at once by dynamic programming over cost (Kellerer, Pferschy, Pisinger:
//! Knapsack Problems, 2004, chapter 11). Sums of costs are sorted into at most [`BINS`] bins, and of each bin the best
//! selection is kept with its true cost. Where costs have a common divisor that makes bins no wider than it, the front is
//! exact; elsewhere the distance to the linear relaxation, a lower bound, says how far from the optimum a point can be.

/// Bins of the sums of costs, at most.
const BINS: u64 = 1 << 14;

/// An option of an item.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    pub cost: u64,
    /// Not negative.
    pub loss: f64,
}

/// A selection that no other one beats in cost and loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub cost: u64,
    pub loss: f64,
    bin: u32,
}

/// What was kept of a bin after an item: the option taken, and the bin that it was added to.
#[derive(Debug, Clone, Copy)]
struct Step {
    parent: u32,
    option: u32,
}

/// Every selection worth having.
#[derive(Debug)]
pub struct Front {
    points: Vec<Point>,
    /// One row an item.
    steps: Vec<Vec<Step>>,
    /// The linear relaxation's corners by ascending cost.
    relaxation: Vec<(u64, f64)>,
    exact: bool,
}

#[derive(Clone, Copy)]
struct Cell {
    offset: u64,
    loss: f64,
}

const EMPTY: Cell = Cell { offset: 0, loss: f64::INFINITY };

impl Front {
    /// Solves for `items`, each a list of options; `None` when an item has no option.
    pub fn solve(items: &[Vec<Choice>]) -> Option<Self> {
        let base: u64 = items.iter().map(|item| item.iter().map(|choice| choice.cost).min()).sum::<Option<u64>>()?;
        let offsets: Vec<Vec<u64>> = items
            .iter()
            .map(|item| {
                let least = item.iter().map(|choice| choice.cost).min().unwrap_or(0);
                item.iter().map(|choice| choice.cost - least).collect()
            })
            .collect();
        let range: u64 = offsets.iter().map(|item| item.iter().max().copied().unwrap_or(0)).sum();
        let divisor = offsets.iter().flatten().fold(0, |a, b| gcd(a, *b)).max(1);
        let width = divisor.max(range / BINS + 1);
        let bins = (range / width + 1) as usize;

        let mut cells = vec![EMPTY; bins];
        cells[0] = Cell { offset: 0, loss: 0.0 };
        let mut reached = 0;
        let mut steps = Vec::with_capacity(items.len());
        for (item, offsets) in items.iter().zip(&offsets) {
            let mut next = vec![EMPTY; bins];
            let mut row = vec![Step { parent: 0, option: 0 }; bins];
            let mut best = f64::INFINITY;
            let mut furthest = 0;
            for (bin, cell) in cells[..=reached].iter().enumerate() {
                // A selection that costs more and loses no less than another can be left out of every larger one, too.
                if cell.loss >= best {
                    continue;
                }
                best = cell.loss;
                for (option, (choice, offset)) in item.iter().zip(offsets).enumerate() {
                    let offset = cell.offset + offset;
                    let target = (offset / width) as usize;
                    let loss = cell.loss + choice.loss;
                    let kept = &mut next[target];
                    if loss < kept.loss || (loss == kept.loss && offset < kept.offset) {
                        *kept = Cell { offset, loss };
                        row[target] = Step { parent: bin as u32, option: option as u32 };
                        furthest = furthest.max(target);
                    }
                }
            }
            reached = furthest;
            cells = next;
            steps.push(row);
        }

        let mut points: Vec<Point> = Vec::new();
        for (bin, cell) in cells[..=reached].iter().enumerate() {
            if cell.loss < points.last().map_or(f64::INFINITY, |point| point.loss) {
                points.push(Point { cost: base + cell.offset, loss: cell.loss, bin: bin as u32 });
            }
        }
        Some(Self { points, steps, relaxation: relaxation(items), exact: width == divisor })
    }

    /// The selections by ascending cost and descending loss.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// The least cost of any selection.
    pub fn least_cost(&self) -> u64 {
        self.points.first().map_or(0, |point| point.cost)
    }

    /// Index of the selection that loses least and costs at most `budget`.
    pub fn within(&self, budget: u64) -> Option<usize> {
        self.points.partition_point(|point| point.cost <= budget).checked_sub(1)
    }

    /// The option of each item in selection `index`.
    pub fn options(&self, index: usize) -> Vec<usize> {
        let mut bin = self.points[index].bin;
        let mut options: Vec<usize> = self
            .steps
            .iter()
            .rev()
            .map(|row| {
                let step = row[bin as usize];
                bin = step.parent;
                step.option as usize
            })
            .collect();
        options.reverse();
        options
    }

    /// By how much selection `index` can lose more than the best one within `budget`, as a share of its own loss.
    pub fn gap(&self, index: usize, budget: u64) -> f64 {
        let loss = self.points[index].loss;
        if self.exact || loss <= 0.0 { 0.0 } else { ((loss - self.lower_bound(budget)) / loss).max(0.0) }
    }

    /// Loss that a further unit of cost saves at `cost`, by the linear relaxation.
    pub fn price(&self, cost: u64) -> f64 {
        let above = self.relaxation.partition_point(|corner| corner.0 <= cost);
        match (above.checked_sub(1).map(|below| self.relaxation[below]), self.relaxation.get(above)) {
            (Some((from, loss)), Some((to, less))) => (loss - less) / (to - from) as f64,
            _ => 0.0,
        }
    }

    /// The linear relaxation's loss within `budget`: no selection loses less.
    fn lower_bound(&self, budget: u64) -> f64 {
        let corners = &self.relaxation;
        let above = corners.partition_point(|corner| corner.0 <= budget);
        match (above.checked_sub(1).map(|below| corners[below]), corners.get(above)) {
            (Some((cost, loss)), Some((next_cost, next_loss))) => {
                loss + (next_loss - loss) * (budget - cost) as f64 / (next_cost - cost) as f64
            }
            (Some((_, loss)), None) => loss,
            (None, _) => f64::INFINITY,
        }
    }
}

/// Corners of the linear relaxation: steps along each item's lower convex hull, the steepest first.
fn relaxation(items: &[Vec<Choice>]) -> Vec<(u64, f64)> {
    let mut at = (0, 0.0);
    let mut edges: Vec<(u64, f64)> = Vec::new();
    for item in items {
        let hull = lower_hull(item);
        at = (at.0 + hull[0].cost, at.1 + hull[0].loss);
        edges.extend(hull.windows(2).map(|pair| (pair[1].cost - pair[0].cost, pair[1].loss - pair[0].loss)));
    }
    edges.sort_by(|a, b| (a.1 / a.0 as f64).total_cmp(&(b.1 / b.0 as f64)));
    let corners = edges.into_iter().scan(at, |at, (cost, loss)| {
        *at = (at.0 + cost, at.1 + loss);
        Some(*at)
    });
    std::iter::once(at).chain(corners).collect()
}

/// The options on the lower convex hull, by ascending cost and descending loss.
fn lower_hull(item: &[Choice]) -> Vec<Choice> {
    let mut sorted = item.to_vec();
    sorted.sort_by(|a, b| a.cost.cmp(&b.cost).then(a.loss.total_cmp(&b.loss)));
    let mut hull: Vec<Choice> = Vec::new();
    for choice in sorted {
        if hull.last().is_some_and(|last| choice.loss >= last.loss) {
            continue;
        }
        while let [.., a, b] = hull.as_slice() {
            let slope = |from: &Choice, to: &Choice| (to.loss - from.loss) / (to.cost - from.cost) as f64;
            if slope(a, b) >= slope(b, &choice) {
                hull.pop();
            } else {
                break;
            }
        }
        hull.push(choice);
    }
    hull
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn best_of_all(items: &[Vec<Choice>], budget: u64) -> Option<f64> {
        let Some((first, rest)) = items.split_first() else { return Some(0.0) };
        let with = |choice: &Choice| Some(choice.loss + best_of_all(rest, budget.checked_sub(choice.cost)?)?);
        first.iter().filter_map(with).min_by(f64::total_cmp)
    }

    fn items(scale: u64) -> impl Strategy<Value = Vec<Vec<Choice>>> {
        let choice = (1_u64..40, 0.0_f64..1.0).prop_map(move |(cost, loss)| Choice { cost: cost * scale + cost % scale, loss });
        prop::collection::vec(prop::collection::vec(choice, 1..5), 1..6)
    }

    proptest! {
        #[test]
        fn small_fronts_are_those_of_trying_everything(items in items(1), budget in 0_u64..220) {
            let front = Front::solve(&items).unwrap();
            prop_assert!(front.exact);
            let found = front.within(budget).map(|index| front.points()[index].loss);
            match (found, best_of_all(&items, budget)) {
                (Some(found), Some(best)) => prop_assert!((found - best).abs() < 1e-12, "{found} {best}"),
                (found, best) => prop_assert_eq!(found.is_some(), best.is_some()),
            }
        }

        #[test]
        fn options_cost_and_lose_what_their_point_says_and_never_beat_the_bound(items in items(999_983)) {
            let front = Front::solve(&items).unwrap();
            for (index, point) in front.points().iter().enumerate() {
                let options = front.options(index);
                let cost: u64 = items.iter().zip(&options).map(|(item, option)| item[*option].cost).sum();
                let loss: f64 = items.iter().zip(&options).map(|(item, option)| item[*option].loss).sum();
                prop_assert_eq!(cost, point.cost);
                prop_assert!((loss - point.loss).abs() < 1e-12);
                prop_assert!(front.lower_bound(point.cost) <= point.loss + 1e-12);
            }
        }
    }

    /// Costs without a common divisor: bins are wider than one cost, and the gap says what that may lose.
    #[test]
    fn a_trimmed_front_reports_its_gap_and_stays_close() {
        let mut seed = 7_u64;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed >> 33
        };
        let items: Vec<Vec<Choice>> = (0..60)
            .map(|_| {
                let (size, weight) = (next() % 900_000 + 100_000, (next() % 1000) as f64 + 1.0);
                (1..6).map(|bits| Choice { cost: size * bits + next() % 97, loss: weight * 0.25_f64.powi(bits as i32) }).collect()
            })
            .collect();
        let front = Front::solve(&items).unwrap();
        assert!(!front.exact);
        for budget in [100_000_000, 120_000_000, 140_000_000] {
            let index = front.within(budget).unwrap();
            let gap = front.gap(index, budget);
            assert!(gap < 0.02, "{gap}");
        }
        assert_eq!(front.within(front.least_cost() - 1), None);
        assert!(Front::solve(&[vec![], vec![Choice { cost: 1, loss: 0.0 }]]).is_none());
    }
}
