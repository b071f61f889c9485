"""A model under accelerate's hooks, offloaded in each way, for the tests of layers that compute under them."""

import accelerate

HOW = ("cpu_offload", "disk_offload", "dispatch", "devices")


def offload(model, how, folder):
    """Let accelerate's hooks keep the tensors of `model`: all on the CPU, all in `folder`, every other layer there, or none."""
    if how == "cpu_offload":
        return accelerate.cpu_offload(model)
    if how == "disk_offload":
        return accelerate.disk_offload(model, folder)
    names = [name for name, module in model.named_modules() if module._parameters]
    places = ["disk", "cpu"] if how == "dispatch" else ["cpu"]
    device_map = {name: places[i % len(places)] for i, name in enumerate(names)}
    return accelerate.dispatch_model(model, device_map, offload_dir=folder, force_hooks=True)
