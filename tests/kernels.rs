//! The CUDA kernels' own sources, built for the processor, against the CPU backend and f64 references, with the threads of a block
//! running in several orders.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

use std::sync::Arc;

use rayon::prelude::*;
use strata::backend::cuda::device::{Device, Memory};
use strata::backend::cuda::emulated::{self, Emulated};
use strata::backend::cuda::sources::{self, Source};
use strata::backend::cuda::verify::{Check, Extent, checks};

/// Threads ascending, descending, and shuffled.
const ORDERS: [i32; 3] = [0, 1, 42];

/// A compiler is what these tests need; without one they are skipped with a word.
fn compiler_is_missing() -> bool {
    let missing = std::process::Command::new(emulated::compiler()).arg("--version").output().is_err();
    if missing {
        eprintln!("skipped: no C++ compiler ({}) to build the kernels with", emulated::compiler());
    }
    missing
}

#[test]
fn every_kernel_agrees_with_its_reference() {
    if compiler_is_missing() {
        return;
    }
    let device = Arc::new(Emulated::new().unwrap());
    let memory = Memory::new(Arc::clone(&device) as Arc<dyn Device>);
    let checks = checks(Extent::Small, 0);
    for order in ORDERS {
        device.set_order(order);
        let run = |(index, check): (usize, &Check)| match check.error(&memory, index as u64 + 1) {
            Ok(error) if check.passes(error) => None,
            Ok(error) => Some(format!("{} on {}: error {error:e}, allowed {:e}", check.kernel, check.shape, check.tolerance)),
            Err(error) => Some(format!("{} on {}: {error}", check.kernel, check.shape)),
        };
        let failed: Vec<String> = checks.par_iter().enumerate().filter_map(run).collect();
        assert!(failed.is_empty(), "threads in order {order}:\n{}", failed.join("\n"));
    }
}

/// Kernels, each broken in one place: file, what stands there, what stands there instead. Index arithmetic, sums, ties, barriers; last
/// what writes past its shared memory.
const MUTANTS: [(&str, &str, &str); 92] = [
    ("embedding.cu", "c / 32 * 16 + c % 16", "c / 32 * 16 + c % 8"),
    ("norm.cu", "index >> shift << (shift + BITS)", "index >> shift << shift"),
    ("norm.cu", "? c / group : c >> shift", "? c % group : c & shift"),
    ("linear_few.cu", "* ROWS + line + i / 2 * 8", "* ROWS + line + i / 2 * 4"),
    ("linear_few.cu", "quad * PARTS / 4 == part", "quad * PARTS / 2 == part"),
    ("linear_few.cu", "inputs.read(set, at + offset)", "inputs.read(set, at)"),
    ("ring.cuh", "line * PITCH, weights + at", "line * PITCH, weights"),
    ("ring.cuh", "(ROWS + WARPS - 1) / WARPS", "ROWS / WARPS"),
    ("stream.cu", "group_wait(1, 32 * (WARPS + ADDING));", ""),
    ("ring.cuh", "        barrier_arrive(empty + at);\n", ""),
    ("ring.cuh", "row * SCALES) + first % 8", "row * SCALES)"),
    ("ring.cuh", "(first - own + step - 1) / step", "(first - own + step) / step"),
    ("stream_one.cu", "ring.stage() + warp * PITCH + lane * 16", "ring.stage() + warp * PITCH"),
    ("stream_one.cu", "if (first + lane * 8 >= width) break;", ""),
    ("stream_one.cu", "load(inputs + 16) : zero()", "load(inputs) : zero()"),
    ("stream_one.cu", "line % PARTS == quad * PARTS / 4", "line % PARTS == quad * PARTS / 2"),
    ("stream_one.cu", "(lower ? last[3] : last[1])", "(lower ? last[2] : last[1])"),
    ("stream_one.cu", "ring.wait_released();\n            const float4", "const float4"),
    ("stream_one.cu", "ring.wait_released(), ring.hand_back();", "ring.wait_released();"),
    ("ring.cuh", "        barrier_arrive(full + at);\n", ""),
    ("front.cuh", "k / 256 * 256 + k % 8 / 4 * 128", "k / 256 * 256 + k % 8 / 4 * 64"),
    ("front.cuh", "scratch.partial[own_group * segments + segment]", "scratch.partial[segment]"),
    ("front.cuh", "if (segment * SEGMENT >= cols) break;", ""),
    ("front.cuh", "65535 / segments + 1", "65536 / segments"),
    ("front.cuh", "    group_wait(FRONT_BARRIER, THREADS);\n    // segment", "    // segment"),
    ("front.cuh", "    group_wait(FRONT_BARRIER, THREADS);\n    return warp_max", "    return warp_max"),
    ("front.cuh", "static_scale || scale < SMALLEST_NORMAL", "static_scale"),
    ("front.cuh", "if (square) held[i]", "if (!square) held[i]"),
    ("front.cuh", "= threadIdx.x + words; at < divide_up", "= threadIdx.x + words + 1; at < divide_up"),
    ("rows.cuh", "fmaxf(x, -limit), limit)", "fmaxf(x, -limit - limit), limit)"),
    ("gemm.cu", "row + lane % 8 + lane / 16 * 8", "row + lane % 8 + lane / 8 % 2 * 8"),
    ("gemm.cu", "const int at = part * CHUNKS + chunk;", "const int at = chunk;"),
    ("wgmma.cu", "((pair ^ line) << 4)", "(pair << 4)"),
    ("wgmma.cu", "copy_wait<S::AHEAD - 1>();", "copy_wait<S::AHEAD>();"),
    ("wgmma.cu", "if (lane == 0) barrier_arrive(ring.empty + slot);", ""),
    ("wgmma.cu", "products_wait<0>();\n            if (part", "if (part"),
    ("wgmma.cu", "ahead.advance(S::UNPACKERS);", "ahead.advance(1);"),
    ("wgmma.cu", "products_wait<1>();", ""),
    ("wgmma.cu", "barrier_arrive(ring.empty + (used - 1) % S::STAGES);", "barrier_arrive(ring.empty + used % S::STAGES);"),
    ("ssd.cu", "p0 + column + n * 8 + lane % 4 * 2 + i % 2", "p0 + n * 8 + lane % 4 * 2 + i % 2"),
    ("calibrate.cu", "static_cast<i64>(c) * (n + 1)", "static_cast<i64>(c) * n"),
    ("conv.cu", "kernel - 1 + at) * channels + c", "kernel - 2 + at) * channels + c"),
    ("ssm.cu", "(m.groups + group) * size", "group * size"),
    ("ssm.cu", "in.scale(slot, b_offset, m.heads + group)", "in.scale(slot, b_offset, group)"),
    ("internals.cu", "(index - layout.heads) * layout.state", "(index - layout.heads) * layout.state / 2"),
    ("rotate.cuh", "lane & half ? other - v[i]", "lane & half ? v[i] - other"),
    ("rotate.cuh", "        if (4 * mask >= size) continue;\n", ""),
    ("internals.cu", "const int at = t - kernel + 1 + k;", "const int at = t - kernel + k;"),
    ("internals.cu", "window[static_cast<i64>(k - 1) * channels + c] = code", "window[static_cast<i64>(k - 1) * channels + c] = codes[i]"),
    ("fixed.cu", "c < 0 ? p : p - channels", "c < 0 ? p + 4 : p - channels"),
    ("fixed.cu", "= held[k + 1];", "= held[k];"),
    ("fixed.cu", "(TAPS - 1 + at) * channels", "(TAPS - 2 + at) * channels"),
    ("fixed.cu", "past.push(held[i]);", "past.push(held[0]);"),
    ("fixed.cu", "one(2, scale.z)", "one(2, scale.y)"),
    ("fixed.cu", "c < inner ? head_block : state_block, largest", "state_block, largest"),
    ("ssm.cu", "        ask();\n        ask_inputs();", "        ask_inputs();"),
    ("ssm.cu", "    __syncthreads();\n    if (warp > 0) return;", "    if (warp > 0) return;"),
    ("scan.cu", "if (n / 4 == warp / 4)", "if (n / 4 == 0)"),
    ("scan.cu", "products.z * factor(first + 8, s,", "products.z * factor(first, s,"),
    ("scan.cu", "held[i].second * share[t + 1]", "held[i].second * share[t]"),
    ("ssd.cu", "s <= t ?", "s < t ?"),
    ("gate.cuh", "z[token * stride + c]", "z[c]"),
    ("ssm.cu", "gate.raw(slot, head * m.head_dim + row(lane))", "gate.raw(slot, row(lane))"),
    ("ssm.cu", "if (lane == own) out = sum;", "out = sum;"),
    ("ssd.cu", "gate.at(begin + t, c)", "gate.at(t, c)"),
    ("scan.cu", "gate.pair(begin + t, c)", "gate.pair(t, c)"),
    ("internals.cu", "gates.at(row, span.first + lane + 32 * i)", "gates.at(row, span.first + lane)"),
    ("attention.cu", "total - (own[1] - 1 - (first + row))", "total - (own[1] - (first + row))"),
    ("attention.cu", "lane < count ? ((sums", "true ? ((sums"),
    ("attention.cu", "sum = sum * correction + p", "sum = sum + p"),
    ("attention.cu", "at >= 0 && at % READERS == reader", "at >= 0 && reader == 0"),
    ("attention.cu", "? newest - next : -1", "? newest - first : -1"),
    ("attention.cu", "from += STEP_KEYS * stride", "from += STEP_KEYS / 2 * stride"),
    ("attention.cu", "first + i + j < splits &&", "first + i + j + 1 < splits &&"),
    ("attention.cu", "if (threadIdx.x == 0) lengths[place] = length;", "if (threadIdx.x == 0) lengths[slot] = length;"),
    ("ticket.cuh", "if (last) *ticket = 0;", ""),
    ("logits.cu", "begin = blockIdx.x * width", "begin = 0"),
    ("logits.cu", "b.value == a.value && b.index < a.index", "b.value == a.value && b.index > a.index"),
    ("attention.cu", "return scales[row * kv_heads + head];", "return scales[row + head];"),
    ("moe.cu", "own[at - 1] > best", "own[at - 1] < best"),
    ("moe.cu", "if (e < expert) place += totals[e]", "if (e <= expert) place += totals[e]"),
    ("moe.cu", "for (int i = 0; i < share; ++i) place", "for (int i = 1; i < share; ++i) place"),
    ("moe.cu", "minimum(height, totals[expert] - at)", "height"),
    ("gemm.cu", "x_row(rows.first + row, x_rows) * row_bytes", "(rows.first + row) * row_bytes"),
    ("gemm.cu", "x_scales[x_row(token, x_rows)], w_scales[row]", "x_scales[token], w_scales[row]"),
    ("gptq.cu", "shares[lane + 32 * i]", "shares[lane + 16 * i]"),
    ("gptq.cu", "held[i], __fmul_rn(step, own[lane + 32 * i])", "held[i], __fmul_rn(step, own[lane + 16 * i])"),
    ("norm.cu", "cols / 128 - 1) / segments * segments", "cols / 128 - 1) / segments"),
    ("norm.cu", "        if (128 * step >= size) break;\n", ""),
    ("norm.cu", "index / 128 * hadamard + index % 128", "index / 128 * 128 + index % 128"),
    ("norm.cu", "return c + (c >> 5);", "return c + (c >> 4);"),
    ("norm.cu", "scale) : held[i];\n    }\n    __syncthreads();", "scale) : held[i];\n    }"),
];

/// A kernel's name without the type of what it stores, which a macro adds.
fn stem(kernel: &str) -> &str {
    ["_f32", "_bf16", "_f16", "_i8"].into_iter().find_map(|suffix| kernel.strip_suffix(suffix)).unwrap_or(kernel)
}

#[test]
fn a_kernel_that_is_broken_in_one_place_is_caught() {
    if compiler_is_missing() {
        return;
    }
    if let Ok(index) = std::env::var(ONE) {
        let mutant = &MUTANTS[index.parse::<usize>().unwrap()];
        assert!(is_caught(mutant), "not caught: {mutant:?}");
        return;
    }
    // Each in a process of its own: what a broken kernel writes anywhere is that process's alone, and one that dies of it is caught as well.
    let alone = |index: usize| {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "a_kernel_that_is_broken_in_one_place_is_caught"]).env(ONE, index.to_string());
        command.stdout(std::process::Stdio::null()).status().unwrap()
    };
    let survivors: Vec<&str> = (0..MUTANTS.len())
        .filter(|index| {
            let status = alone(*index);
            !status.success() && status.code().is_some()
        })
        .map(|index| MUTANTS[index].1)
        .collect();
    assert!(survivors.is_empty(), "not caught: {survivors:#?}");
}

/// Which mutant a process is to run alone.
const ONE: &str = "STRATA_TEST_MUTANT";

fn is_caught((file, before, after): &(&str, &str, &str)) -> bool {
    let checks = checks(Extent::Small, 0);
    let text = |source: &'static Source| if source.name == *file { source.text.replacen(before, after, 1) } else { source.text.into() };
    let all = || sources::HEADERS.iter().chain(sources::KERNELS);
    assert!(all().any(|source| source.name == *file && source.text.contains(before)), "{file} no longer has `{before}`");
    let mutant = |sources: &'static [Source]| -> Vec<Source> {
        sources.iter().map(|source| Source { name: source.name, text: String::leak(text(source)) }).collect()
    };
    let device = Arc::new(Emulated::with_sources(&mutant(sources::HEADERS), &mutant(sources::KERNELS)).unwrap());
    let memory = Memory::new(device as Arc<dyn Device>);
    // A header's kernels are those of the files that include it.
    let files: Vec<&Source> = all().filter(|source| source.name == *file || source.text.contains(&format!("\"{file}\""))).collect();
    let own = checks.iter().enumerate().filter(|(_, check)| files.iter().any(|source| source.text.contains(stem(check.kernel))));
    own.collect::<Vec<_>>().par_iter().any(|(index, check)| !check.error(&memory, *index as u64 + 1).is_ok_and(|error| check.passes(error)))
}
