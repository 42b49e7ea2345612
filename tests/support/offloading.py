"""Offloading on a machine without an accelerator."""

import torch


def offload_to_meta(pipe, monkeypatch):
    """Offload a pipeline so that components are on the meta device, where nothing can be computed, until they move."""
    plain, weights = torch.nn.Module.to, {}

    def to(module, device):
        if str(device) == "cpu":
            weights[module] = module.state_dict()
            return plain(module, "meta")
        module.load_state_dict(weights.pop(module), assign=True)
        return module

    monkeypatch.setattr(torch.nn.Module, "to", to)
    pipe.enable_model_cpu_offload(device="cpu:0")
