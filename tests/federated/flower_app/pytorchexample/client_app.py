"""The app's client."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from pytorchexample.task import Net, load_data
from pytorchexample.task import test as test_fn
from pytorchexample.task import train as train_fn

# Flower ClientApp
app = ClientApp()


def received(msg: Message, context: Context):
    """The global model, and the site's data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    config = context.node_config
    batch_size = context.run_config.get("batch-size", 32)
    return model, *load_data(config["partition-id"], config["num-partitions"], batch_size)


@app.train()
def train(msg: Message, context: Context) -> Message:
    """One round of local training."""
    model, trainloader, _ = received(msg, context)
    loss = train_fn(model, trainloader, 1, msg.content["config"]["lr"])
    metrics = {"train_loss": loss, "num-examples": len(trainloader.dataset)}
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Scores of the global model."""
    model, _, testloader = received(msg, context)
    metrics = {"eval_acc": test_fn(model, testloader), "num-examples": len(testloader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
