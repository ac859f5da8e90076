//! Mixtures of experts: the router's choice, the order of what it chose, and the sum of what the experts put out.

use super::{Check, EXACT, Extent, FLOAT, Lab, difference, mismatches, worse};
use crate::backend::cuda::device::{Arguments, Buffer};
use crate::error::Result;

pub fn checks(extent: Extent) -> Vec<Check> {
    let mut all = Vec::new();
    for (experts, chosen, groups, top_groups) in [(4, 2, 1, 1), (6, 2, 1, 1), (128, 6, 1, 1), (64, 4, 8, 3), (33, 5, 1, 1)] {
        let name = format!("{experts} experts, {chosen} chosen, {top_groups} of {groups} groups");
        all.push(Check::new("route", name, FLOAT, move |lab| route(lab, experts, chosen, groups, top_groups)));
    }
    all.push(Check::new("combine", "5 tokens of 3 experts x 300", EXACT, combine));
    let mut sorted = vec![(1, 4, 2, 8), (5, 6, 2, 8), (3, 33, 5, 64), (70, 4, 3, 8), (40, 128, 6, 128), (9, 1, 1, 8), (6, 1024, 2, 8)];
    if extent == Extent::Published {
        sorted.extend([(2048, 128, 6, 128), (4096, 512, 22, 128)]);
    }
    for (tokens, experts, chosen, height) in sorted {
        let name = format!("{tokens} tokens, {chosen} of {experts} experts, tiles of {height}");
        all.push(Check::new("sort_pairs", name, EXACT, move |lab| sort(lab, tokens, experts, chosen, height)));
    }
    all
}

fn route(lab: &Lab, experts: usize, chosen: usize, groups: usize, top_groups: usize) -> Result<f64> {
    let (tokens, scaling) = (5, 2.5_f32);
    let (mut logits, correction) = (lab.normal(70, tokens * experts), lab.normal(71, experts).iter().map(|x| 0.1 * x).collect::<Vec<_>>());
    // Equals: the first is chosen.
    let equal = correction.clone();
    logits[..experts].fill(0.25);
    let correction: Vec<f32> = if groups == 1 { vec![0.125; experts] } else { equal };
    let (raw, bias) = (lab.put(&logits)?, lab.put(&correction)?);
    let pairs = tokens * chosen;
    let (ids, weights) = (lab.poisoned::<i32>(pairs)?, lab.poisoned::<f32>(pairs)?);
    let (tiles, rows) = (lab.poisoned::<i32>(3 * pairs)?, lab.poisoned::<i32>(pairs)?);
    let arguments = Arguments::default().with(&raw).with(&bias).with(tokens).with(experts).with(chosen).with(groups).with(top_groups);
    let arguments = arguments.with(1_usize).with(scaling).with(&ids).with(&weights).with(&tiles).with(&rows);
    lab.launch("route", [tokens, 1, 1], 32, 8 * experts + 8 * groups, arguments)?;
    let (mut expected_ids, mut expected_weights) = (Vec::new(), Vec::new());
    for logits in logits.chunks_exact(experts) {
        let scores: Vec<f64> = logits.iter().map(|x| 1.0 / (1.0 + (-f64::from(*x)).exp())).collect();
        let mut choice: Vec<f64> = scores.iter().zip(&correction).map(|(score, correction)| score + f64::from(*correction)).collect();
        let size = experts / groups;
        let best = |values: &[f64], count: usize| {
            let mut order: Vec<usize> = (0..values.len()).collect();
            order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
            order.truncate(count);
            order
        };
        let sums: Vec<f64> = choice.chunks_exact(size).map(|group| best(group, 2).iter().map(|i| group[*i]).sum()).collect();
        let kept = best(&sums, top_groups);
        for (group, choice) in choice.chunks_exact_mut(size).enumerate() {
            if !kept.contains(&group) {
                choice.fill(f64::NEG_INFINITY);
            }
        }
        let mut own = best(&choice, chosen);
        own.sort_unstable();
        let total: f64 = own.iter().map(|expert| scores[*expert]).sum();
        expected_weights.extend(own.iter().map(|expert| scores[*expert] / total * f64::from(scaling)));
        expected_ids.extend(own.iter().map(|expert| *expert as i32));
    }
    let expected_tiles: Vec<i32> = expected_ids.iter().enumerate().flat_map(|(pair, id)| [*id, pair as i32, 1]).collect();
    let expected_rows: Vec<i32> = (0..pairs).map(|pair| (pair / chosen) as i32).collect();
    let wrong = mismatches(&ids.download::<i32>(pairs)?, &expected_ids)
        + mismatches(&tiles.download::<i32>(3 * pairs)?, &expected_tiles)
        + mismatches(&rows.download::<i32>(pairs)?, &expected_rows);
    Ok(worse(difference(&weights.download::<f32>(pairs)?, &expected_weights), wrong))
}

fn combine(lab: &Lab) -> Result<f64> {
    let (tokens, chosen, cols) = (5, 3, 300);
    let (x, weights) = (lab.normal(72, tokens * chosen * cols), lab.normal(73, tokens * chosen));
    // A pair's place is another one than its number.
    let places: Vec<i32> = (0..tokens * chosen).map(|pair| ((pair * 7) % (tokens * chosen)) as i32).collect();
    let (input, pairs, shares, out) = (lab.put(&x)?, lab.put(&places)?, lab.put(&weights)?, lab.poisoned::<f32>(tokens * cols)?);
    let blocks = [cols.div_ceil(256), tokens, 1];
    let arguments = |pairs: Option<&Buffer>| Arguments::default().with(&input).with(pairs).with(&shares).with(chosen).with(cols).with(&out);
    let expected = |place: &dyn Fn(usize) -> usize| {
        let mut sum = vec![0.0_f32; tokens * cols];
        for pair in 0..tokens * chosen {
            let x = &x[place(pair) * cols..(place(pair) + 1) * cols];
            sum[pair / chosen * cols..][..cols].iter_mut().zip(x).for_each(|(sum, x)| *sum += weights[pair] * x);
        }
        sum
    };
    lab.launch("combine", blocks, 256, 0, arguments(Some(&pairs)))?;
    let mut wrong = mismatches(&out.download::<f32>(tokens * cols)?, &expected(&|pair| places[pair] as usize));
    lab.launch("combine", blocks, 256, 0, arguments(None))?;
    wrong += mismatches(&out.download::<f32>(tokens * cols)?, &expected(&|pair| pair));
    Ok(wrong)
}

/// The last expert is chosen by no token where there are others, the first by all.
fn sort(lab: &Lab, tokens: usize, experts: usize, chosen: usize, height: usize) -> Result<f64> {
    let scores = lab.normal(74, tokens * experts);
    let mut ids: Vec<i32> = Vec::new();
    for scores in scores.chunks_exact(experts) {
        let others = experts.saturating_sub(2).max(chosen - 1);
        let mut order: Vec<usize> = (1..=others).collect();
        order.sort_by(|a, b| scores[a % experts].total_cmp(&scores[b % experts]));
        let mut own: Vec<usize> = order[..chosen - 1].iter().copied().chain([0]).collect();
        own.sort_unstable();
        ids.extend(own.into_iter().map(|expert| expert as i32));
    }
    let pairs = tokens * chosen;
    let count = (pairs + experts.min(pairs) * (height - 1)) / height;
    let (choice, places) = (lab.put(&ids)?, lab.poisoned::<i32>(pairs)?);
    let (x_rows, tiles) = (lab.poisoned::<i32>(pairs)?, lab.poisoned::<i32>(3 * count)?);
    let arguments = Arguments::default().with(&choice).with(pairs).with(chosen).with(experts).with(height).with(count);
    lab.launch("sort_pairs", [1, 1, 1], 1024, 0, arguments.with(&places).with(&x_rows).with(&tiles))?;
    let mut order: Vec<usize> = (0..pairs).collect();
    order.sort_by_key(|pair| (ids[*pair], *pair));
    let mut expected_places = vec![0; pairs];
    order.iter().enumerate().for_each(|(place, pair)| expected_places[*pair] = place as i32);
    let mut expected_tiles = Vec::new();
    let mut first = 0;
    for own in order.chunk_by(|a, b| ids[*a] == ids[*b]) {
        for tile in own.chunks(height) {
            expected_tiles.extend([ids[tile[0]], first, tile.len() as i32]);
            first += tile.len() as i32;
        }
    }
    expected_tiles.resize(3 * count, 0);
    let expected_rows: Vec<i32> = order.iter().map(|pair| (pair / chosen) as i32).collect();
    Ok(mismatches(&places.download::<i32>(pairs)?, &expected_places)
        + mismatches(&x_rows.download::<i32>(pairs)?, &expected_rows)
        + mismatches(&tiles.download::<i32>(3 * count)?, &expected_tiles))
}
