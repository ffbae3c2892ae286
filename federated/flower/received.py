"""A message of a Flower server as it came in, and what may be said of a failed answer to it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.common.constant import ErrorCode

from federated.flower.records import Arrays, only_arrays, refused_by_client

# What a server is told; the reason stays in the site's log.
WITHHELD = "withheld by the site"
FAILED = "the client failed; its site has the reason"
# What strategies call the number of a round.
_ROUND_KEYS = ("server-round", "server_round")
_ERROR_CODES = {value for name, value in vars(ErrorCode).items() if name.isupper()}


@dataclass(frozen=True)
class Received:
    """A message, kept before the app sees it, which may change it.

    Attributes:
        metadata: A reply is addressed by.
        arrays: Of the global model; None where there is not one record of arrays.
        stated: The round that the server states; None where it states none.
    """

    metadata: Metadata
    arrays: Arrays | None
    stated: Any

    @staticmethod
    def of(message: Message) -> Received:
        """Take note of a message."""
        metadata = copy.deepcopy(message.metadata)
        return Received(metadata, only_arrays(message.content), _stated_round(message))

    @property
    def is_training(self) -> bool:
        """Whether an update is asked for."""
        return self.metadata.message_type.partition(".")[0] == "train"

    def reply(self, content: RecordDict | Error) -> Message:
        """A new message to whom this one came from: nothing of the app's own travels with it."""
        return Message(content, reply_to=Message(RecordDict(), metadata=self.metadata))


def _stated_round(message: Message) -> Any:
    for record in message.content.config_records.values():
        for key in _ROUND_KEYS:
            if key in record:
                return record[key]
    group = message.metadata.group_id
    return int(group) if group.isdecimal() else None


def withheld() -> Error:
    """The answer in place of one that stays. Strategies leave a client out that failed."""
    return Error(ErrorCode.MOD_FAILED_PRECONDITION, WITHHELD)


def failure(answered: object) -> Error | None:
    """The code of a failed task, and nothing else; None where there is a message with content.

    Flower would send an exception's text, which can hold anything.
    """
    if not isinstance(answered, Message):
        return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FAILED)
    if answered.has_error():
        code = answered.error.code
        return Error(code if code in _ERROR_CODES else ErrorCode.UNKNOWN, FAILED)
    if refused_by_client(answered.content):
        return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FAILED)
    return None
