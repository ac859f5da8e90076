"""Decompresses a portable variant with the `compressed-tensors` package and compares logits with strata's own.

    python tests/portable.py STRATA VARIANT

STRATA is the binary. The weights are unpacked and dequantized by compressed-tensors' own functions under the
`quantization_config` of the variant, and run by transformers' Nemotron-H in float32; strata's logits come from
`strata trace` on the same variant. Activations are int8 in strata and floats here where the scheme has them: only
weight-only variants must agree closely. Prints `skipped: REASON` where a package is missing.
"""

import json
import pathlib
import subprocess
import sys
import tempfile


def skip(reason):
    print(f"skipped: {reason}")
    raise SystemExit(0)


try:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    skip(f"{error.name} is not installed")

# Largest difference of a logit between two float32 implementations.
TOLERANCE = 2e-3


def float_weights(variant, config):
    """The variant's tensors with every quantized weight dequantized by compressed-tensors."""
    tensors = {}
    for path in sorted(variant.glob("*.safetensors")):
        tensors.update(load_file(path))
    for group in config["quantization_config"]["config_groups"].values():
        arguments = QuantizationArgs(**group["weights"])
        for module in group["targets"]:
            scale = tensors.pop(f"{module}.weight_scale").float()
            if f"{module}.weight_packed" in tensors:
                shape = torch.Size(tensors.pop(f"{module}.weight_shape").tolist())
                codes = unpack_from_int32(tensors.pop(f"{module}.weight_packed"), arguments.num_bits, shape)
            else:
                codes = tensors.pop(f"{module}.weight")
            tensors[f"{module}.weight"] = dequantize(codes, scale, zero_point=None, args=arguments, dtype=torch.float32)
    assert not [name for name in tensors if "weight_packed" in name or "weight_scale" in name], "a module is in no group"
    return {name: values.float() for name, values in tensors.items()}


def main():
    binary, variant = sys.argv[1], pathlib.Path(sys.argv[2])
    config = json.loads((variant / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    ids = [(i * 37 + 5) % 1000 for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "ids.json").write_text(json.dumps({"input_ids": [ids]}))
        subprocess.run([binary, "trace", str(variant), "--ids", folder / "ids.json", "-o", folder / "trace.safetensors"], check=True)
        with safe_open(folder / "trace.safetensors", "pt") as trace:
            expected = trace.get_tensor("logits")

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(plain))
        settings = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    weights = float_weights(variant, config)
    known = set(model.state_dict())
    renamed = {name if name in known else name.replace("backbone.", "model.", 1): values for name, values in weights.items()}
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    for module in model.modules():
        # The configuration's range of dt; the class takes time_step_min for its lower end.
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(model.config.time_step_limit)
    with torch.no_grad():
        found = model(torch.tensor([ids]), use_cache=False).logits
    difference = (found - expected).abs().max().item()
    print(f"largest difference of a logit: {difference:.2e}, of {expected.abs().max().item():.1f}")
    assert difference < TOLERANCE, difference


if __name__ == "__main__":
    main()
