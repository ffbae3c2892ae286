"""The app's server."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from pytorchexample.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Average two clients, and keep the model."""
    config = context.run_config
    torch.manual_seed(0)
    arrays = ArrayRecord(Net().state_dict())
    result = FedAvg(fraction_evaluate=config.get("fraction-evaluate", 1.0)).start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": config.get("learning-rate", 0.1)}),
        num_rounds=config.get("num-server-rounds", 1),
    )
    if "final-model" in config:
        torch.save(result.arrays.to_torch_state_dict(), config["final-model"])
