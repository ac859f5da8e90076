"""The peer of docs/methods.md: GPTQModel quantizes a checkpoint to 4 bits in groups of 128, symmetric, on the same
calibration text, and its dequantized weights become a checkpoint that `strata compare` evaluates like any other.

    python benches/peer_gptqmodel.py models/demo -o PEER
    strata compare models/demo PEER VARIANT --tasks none --no-speed

GPTQModel's own loader is tried first (`--loader-only` stops there). Where it fails, its GPTQ class is run layer by layer
on transformers' model: every block reads what the quantized blocks before it put out, and its linears are taken in the
order of GPTQModel's definition of Nemotron-H. Needs `pip install gptqmodel transformers torch`.
"""

import argparse
import json
import os
import pathlib
import shutil
import time

# GPTQModel sizes its pools of workers by the processors it sees, and does not start with fewer than four.
if (os.cpu_count() or 1) < 4:
    os.cpu_count = lambda: 4

import torch
from safetensors.torch import load_file, save_file

# The stages of GPTQModel's definition of Nemotron-H (`module_tree`).
STAGES = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("in_proj", "out_proj"), ("up_proj",), ("down_proj",)]


def calibration(model, path, sequences, length):
    """Windows of the text, evenly spread over it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    windows = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    step = len(windows) / sequences
    return [windows[int(i * step)] for i in range(sequences)], tokenizer


def config_for(bits, group):
    from gptqmodel import QuantizeConfig

    return QuantizeConfig(bits=bits, group_size=group, sym=True, desc_act=False)


def by_loader(source, samples, tokenizer, config):
    """GPTQModel from end to end; returns the dequantized weights by name."""
    from gptqmodel import GPTQModel

    model = GPTQModel.load(str(source), config, trust_remote_code=False)
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples], tokenizer=tokenizer, batch_size=1)
    weights = {}
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            weights[name + ".weight"] = module.dequantize_weight().T.contiguous().float()
    if not weights:
        raise RuntimeError("the loader quantized no module")
    return weights


def by_class(source, samples, config):
    """GPTQModel's GPTQ class on one stage of one block at a time; returns the dequantized weights by name."""
    from gptqmodel.quantization.gptq import GPTQ
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    # The published range of dt, not the class's own clamp at time_step_min.
    for module in model.modules():
        if hasattr(module, "time_step_min"):
            module.time_step_min = 0.0
    weights = {}
    blocks = next(module for name, module in model.named_modules() if name.endswith(".layers") and "." in name)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    # What each block is called with besides the hidden states, and the hidden states in front of the first.
    states, calls = [], [[] for _ in blocks]
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0].detach()))]
    for call, block in zip(calls, blocks):
        hooks.append(block.register_forward_pre_hook(lambda _, args, kwargs, call=call: call.append((args[1:], kwargs)), with_kwargs=True))
    with torch.no_grad():
        for ids in samples:
            model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()

    def through(block, index):
        """Runs the block on every sample; returns what it puts out."""
        outputs = []
        with torch.no_grad():
            for hidden, (args, kwargs) in zip(states, calls[index]):
                output = block(hidden, *args, **kwargs)
                outputs.append(output[0] if isinstance(output, tuple) else output)
        return outputs

    for index, block in enumerate(blocks):
        for stage in STAGES:
            linears = {name: getattr(block.mixer, name) for name in stage if hasattr(block.mixer, name)}
            if not linears:
                continue
            tasks, hooks = {}, []
            for name, linear in linears.items():
                tasks[name] = GPTQ(linear, qcfg=config)
                tasks[name].quantizer.configure(perchannel=True)
                hooks.append(linear.register_forward_hook(lambda _, x, y, task=tasks[name]: task.add_batch(x[0].detach(), y.detach())))
            through(block, index)
            for hook in hooks:
                hook.remove()
            for name, linear in linears.items():
                quantized = tasks[name].quantize()[0]
                linear.weight.data = quantized.to(torch.float32)
                weights[f"{prefix}.{index}.mixer.{name}.weight"] = linear.weight.data.clone()
        states = through(block, index)
        print(f"block {index} done", flush=True)
    return weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True)
    parser.add_argument("--calibration", type=pathlib.Path, help="default: calibration.txt beside the model")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--loader-only", action="store_true")
    parser.add_argument("--class-only", action="store_true")
    args = parser.parse_args()

    text = args.calibration or args.model / "calibration.txt"
    samples, tokenizer = calibration(args.model, text, args.sequences, args.length)
    config, weights = config_for(args.bits, args.group), None
    began = time.monotonic()
    if not args.class_only:
        try:
            weights = by_loader(args.model, samples, tokenizer, config)
            print("quantized by GPTQModel's loader")
        except Exception as error:  # whatever stops the loader is what is reported
            print(f"GPTQModel's loader failed: {type(error).__name__}: {error}")
            if args.loader_only:
                raise SystemExit(1)
    if weights is None:
        weights = by_class(args.model, samples, config)
        print("quantized by GPTQModel's GPTQ class, layer by layer")
    print(f"{time.monotonic() - began:.0f} s")

    tensors = load_file(args.model / "model.safetensors")
    for name, values in weights.items():
        stored = name if name in tensors else name.replace("model.layers", "backbone.layers")
        assert tensors[stored].shape == values.shape, stored
        tensors[stored] = values.contiguous()
    args.output.mkdir(parents=True)
    save_file(tensors, args.output / "model.safetensors", metadata={"format": "pt"})
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(args.model / name, args.output / name)
    print(json.dumps({"linears": len(weights), "output": str(args.output)}))


if __name__ == "__main__":
    main()
