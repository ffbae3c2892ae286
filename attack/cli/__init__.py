"""The command of stage 3: its flags, its results, the search of hyper-parameters."""
