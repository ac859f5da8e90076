//! Sort-and-cluster (Quamba2, Chiang et al., 2025): channels of like magnitude share a scale.

/// Bounds of x `[heads, head_dim]` with a common bound for each cluster: heads are sorted by their largest bound and
/// divided into `head_groups`; in each of these, channels (their largest bound over its heads) into `channel_groups`.
/// Every channel's result is the largest bound of its cluster.
pub fn heads_and_channels(bounds: &[f32], head_dim: usize, head_groups: usize, channel_groups: usize) -> Vec<f32> {
    let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0, f32::max);
    let heads: Vec<f32> = bounds.chunks_exact(head_dim).map(|head| largest(&mut head.iter().copied())).collect();
    let mut out = vec![0.0; bounds.len()];
    for members in clusters(&heads, head_groups) {
        let channels: Vec<f32> = (0..head_dim).map(|p| largest(&mut members.iter().map(|head| bounds[head * head_dim + p]))).collect();
        for cluster in clusters(&channels, channel_groups) {
            let bound = largest(&mut cluster.iter().map(|p| channels[*p]));
            for head in &members {
                for p in &cluster {
                    out[head * head_dim + p] = bound;
                }
            }
        }
    }
    out
}

/// Indices of `values` in at most `count` clusters of neighbours in sorted order, so that the sum of squared bounds, which
/// the power of rounding noise is proportional to, is least: a bound is the largest value of a cluster.
fn clusters(values: &[f32], count: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]).then(a.cmp(b)));
    let n = order.len();
    let count = count.min(n);
    // best[k][end]: least cost of the first `end` values in k + 1 clusters, and where the last of these begins.
    let cost = |start: usize, end: usize| (end - start) as f64 * f64::from(values[order[end - 1]]).powi(2);
    let mut best = vec![(0..=n).map(|end| if end == 0 { (0.0, 0) } else { (cost(0, end), 0) }).collect::<Vec<_>>()];
    for k in 1..count {
        let least = |end: usize| {
            let options = (k..end).map(|start| (best[k - 1][start].0 + cost(start, end), start));
            options.fold((f64::INFINITY, 0), |least, option| if option.0 < least.0 { option } else { least })
        };
        let row = (0..=n).map(|end| if end <= k { (f64::INFINITY, 0) } else { least(end) }).collect();
        best.push(row);
    }
    let mut found = Vec::with_capacity(count);
    let mut end = n;
    for row in best.iter().rev() {
        let start = row[end].1;
        found.push(order[start..end].to_vec());
        end = start;
    }
    found.reverse();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_part_where_magnitudes_do() {
        assert_eq!(clusters(&[1.0, 9.0, 1.1, 8.0, 0.9, 30.0], 3), [vec![4, 0, 2], vec![3, 1], vec![5]]);
        assert_eq!(clusters(&[2.0, 1.0], 5), [vec![1], vec![0]]);
    }

    #[test]
    fn every_bound_covers_its_channel_and_more_clusters_are_tighter() {
        let bounds: Vec<f32> = (0..8 * 16).map(|i| 0.1 + ((i * 37) % 101) as f32 * if i / 16 == 3 { 5.0 } else { 0.2 }).collect();
        let total = |head_groups, channel_groups| {
            let found = heads_and_channels(&bounds, 16, head_groups, channel_groups);
            assert!(found.iter().zip(&bounds).all(|(found, bound)| found >= bound));
            found.iter().sum::<f32>()
        };
        assert!(total(4, 4) < total(2, 4) && total(2, 4) < total(1, 1));
        assert_eq!(heads_and_channels(&bounds, 16, 8, 16), bounds, "as many clusters as channels");
    }
}
