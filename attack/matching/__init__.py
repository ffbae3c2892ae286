"""The matching loss and its gradient in the inputs: exact, as a difference of passes, sharded."""
