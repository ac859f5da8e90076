//! Mixtures of experts: the router's choice stays on the device, and each linear of all experts is one launch.
//!
//! A *pair* is a token with one of the experts that it chose. Pairs are sorted by expert and divided into *tiles*, which
//! the kernels of the linears take instead of runs of tokens.

use std::sync::Arc;

use super::Cuda;
use super::device::{Arguments, Buffer};
use super::linear::{CudaLinear, Product};
use super::tensor::{CudaActivation, CudaTensor, Front};
use crate::backend::{Assignment, RouterShape};
use crate::error::{Error, Result};

/// Threads of `sort_pairs`, which has one or more for each expert.
const SORTERS: usize = 1024;

/// The experts of a mixture.
pub struct CudaExperts {
    up: Alike,
    down: Alike,
}

/// The same linear of every expert: one shape, one format.
struct Alike {
    linears: Vec<Arc<CudaLinear>>,
    /// Addresses of each one's weights, scales and bias, as `kernels/experts.cuh` has them.
    table: Buffer,
}

/// Which experts the tokens chose, ascending in each token, and with which weights, `[tokens, chosen]` each.
struct Choice {
    experts: Buffer,
    weights: Buffer,
}

/// Pairs sorted by expert.
struct Sorted {
    /// Where each pair stands; `None`: as they are.
    places: Option<Buffer>,
    /// The token of each place.
    x_rows: Buffer,
    tiles: Tiles,
}

/// Tiles of pairs: (expert, first place, pairs) each.
struct Tiles {
    buffer: Buffer,
    /// As many as there may be; those that there are not have no pairs.
    count: usize,
}

/// What the kernel of a linear takes for experts.
pub(super) struct Selection<'a> {
    table: &'a Buffer,
    tiles: &'a Tiles,
    x_rows: Option<&'a Buffer>,
}

impl Selection<'_> {
    /// Tiles of the launch.
    pub(super) fn tiles(&self) -> usize {
        self.tiles.count
    }

    /// The kernels' parameters for experts: table, tiles, rows of the activations. Null without.
    pub(super) fn arguments(selection: Option<&Self>, arguments: Arguments) -> Arguments {
        arguments
            .with(selection.map(|experts| experts.table))
            .with(selection.map(|experts| &experts.tiles.buffer))
            .with(selection.and_then(|experts| experts.x_rows))
    }
}

impl Alike {
    fn first(&self) -> &CudaLinear {
        &self.linears[0]
    }

    /// The kind of kernel that multiplies `pairs` pairs: by what falls to an expert on average.
    fn product(&self, pairs: usize) -> Product {
        self.first().product_of_experts(pairs.div_ceil(self.linears.len()))
    }
}

impl Cuda {
    /// See [`crate::backend::Backend::prepare_experts`]. Experts that are not alike, or read activations by static scales of
    /// their own, are computed one after another.
    pub(super) fn experts_at_once(&self, experts: &[[&Arc<CudaLinear>; 2]]) -> Result<Option<CudaExperts>> {
        if experts.is_empty() || experts.len() > SORTERS {
            return Ok(None);
        }
        let alike = |which: usize| {
            let linears: Vec<_> = experts.iter().map(|expert| Arc::clone(expert[which])).collect();
            if !linears.iter().all(|linear| linear.is_like(&linears[0])) {
                return Ok(None);
            }
            let Some(addresses) = linears.iter().map(|linear| linear.addresses()).collect::<Option<Vec<_>>>() else { return Ok(None) };
            Ok::<_, Error>(Some(Alike { table: self.upload_values(addresses.as_flattened())?, linears }))
        };
        Ok(alike(0)?.zip(alike(1)?).map(|(up, down)| CudaExperts { up, down }))
    }

    /// See [`crate::backend::Backend::mixture`].
    pub(super) fn sum_of_experts(
        &self,
        experts: &CudaExperts,
        x: &CudaActivation,
        raw: &CudaTensor,
        correction: &Buffer,
        shape: &RouterShape,
    ) -> Result<CudaTensor> {
        let (tokens, chosen) = (raw.rows, shape.experts_per_token);
        let pairs = tokens * chosen;
        let (up, down) = (experts.up.product(pairs), experts.down.product(pairs));
        let (choice, sorted) = self.choose(raw, correction, shape, up.height())?;
        // One of the linears may go in other tiles than the other.
        let others = if down.height() == up.height() { None } else { Some(self.sort(&choice, tokens, shape, down.height())?.tiles) };
        let selection = Selection { table: &experts.up.table, tiles: &sorted.tiles, x_rows: Some(&sorted.x_rows) };
        let wide = self.tensor(pairs, experts.up.first().outputs())?;
        self.product_by_experts(experts.up.first(), up, x, &wide, &selection)?;
        let inner = self.activation(Front { square: true, ..Front::plain(wide) }, experts.down.first().reads())?;
        let selection = Selection { table: &experts.down.table, tiles: others.as_ref().unwrap_or(&sorted.tiles), x_rows: None };
        let rows = self.tensor(pairs, experts.down.first().outputs())?;
        self.product_by_experts(experts.down.first(), down, &inner, &rows, &selection)?;
        let out = self.tensor(tokens, rows.cols)?;
        let arguments = Arguments::default().with(rows.buffer()).with(sorted.places.as_ref()).with(&choice.weights);
        let blocks = [rows.cols.div_ceil(256), tokens, 1];
        self.launch("combine", blocks, 256, 0, arguments.with(chosen).with(rows.cols).with(out.buffer()))?;
        Ok(out)
    }

    /// What the router chooses, and the pairs in tiles of `height`.
    fn choose(&self, raw: &CudaTensor, correction: &Buffer, shape: &RouterShape, height: usize) -> Result<(Choice, Sorted)> {
        let (tokens, chosen) = (raw.rows, shape.experts_per_token);
        if tokens != 1 {
            let choice = self.route(raw, correction, shape, None)?;
            let sorted = self.sort(&choice, tokens, shape, height)?;
            return Ok((choice, sorted));
        }
        // The experts of one token are sorted already.
        let (buffer, x_rows) = (self.buffer::<i32>(3 * chosen)?, self.buffer::<i32>(chosen)?);
        let choice = self.route(raw, correction, shape, Some((&buffer, &x_rows)))?;
        Ok((choice, Sorted { places: None, x_rows, tiles: Tiles { buffer, count: chosen } }))
    }

    fn sort(&self, choice: &Choice, tokens: usize, shape: &RouterShape, height: usize) -> Result<Sorted> {
        let pairs = tokens * shape.experts_per_token;
        // Each expert's last tile may have a single pair.
        let count = (pairs + shape.experts.min(pairs) * (height - 1)) / height;
        let (places, x_rows, buffer) = (self.buffer::<i32>(pairs)?, self.buffer::<i32>(pairs)?, self.buffer::<i32>(3 * count)?);
        let arguments = Arguments::default().with(&choice.experts).with(pairs).with(shape.experts_per_token).with(shape.experts);
        let arguments = arguments.with(height).with(count).with(&places).with(&x_rows).with(&buffer);
        self.launch("sort_pairs", [1, 1, 1], SORTERS, 0, arguments)?;
        Ok(Sorted { places: Some(places), x_rows, tiles: Tiles { buffer, count } })
    }

    /// Launches the router; of one token it also puts down each pair as a tile, and its row.
    fn route(&self, raw: &CudaTensor, correction: &Buffer, shape: &RouterShape, tiles: Option<(&Buffer, &Buffer)>) -> Result<Choice> {
        let (tokens, chosen) = (raw.rows, shape.experts_per_token);
        let choice = Choice { experts: self.buffer::<i32>(tokens * chosen)?, weights: self.buffer::<f32>(tokens * chosen)? };
        let arguments = Arguments::default()
            .with(raw.buffer())
            .with(correction)
            .with(tokens)
            .with(shape.experts)
            .with(chosen)
            .with(shape.groups)
            .with(shape.top_groups)
            .with(shape.normalize)
            .with(shape.scaling)
            .with(&choice.experts)
            .with(&choice.weights)
            .with(tiles.map(|(tiles, _)| tiles))
            .with(tiles.map(|(_, x_rows)| x_rows));
        self.launch("route", [tokens, 1, 1], 32, 8 * shape.experts + 8 * shape.groups, arguments)?;
        Ok(choice)
    }

    /// The choice, a few numbers a token, on the host, which goes expert by expert.
    pub(super) fn assignments(&self, raw: &CudaTensor, correction: &Buffer, shape: &RouterShape) -> Result<Vec<Assignment>> {
        let (tokens, chosen) = (raw.rows, shape.experts_per_token);
        let choice = self.route(raw, correction, shape, None)?;
        let (experts, weights) = (choice.experts.download::<i32>(tokens * chosen)?, choice.weights.download::<f32>(tokens * chosen)?);
        let mut assigned = vec![Assignment::default(); shape.experts];
        for (pair, (expert, weight)) in experts.into_iter().zip(weights).enumerate() {
            let expert = assigned.get_mut(expert as usize).ok_or_else(|| Error::run("the router chose an expert that is not there"))?;
            expert.tokens.push(pair / chosen);
            expert.weights.push(weight);
        }
        Ok(assigned)
    }
}
