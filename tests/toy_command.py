"""A command as cells run it, but of a millisecond: writes a record with a number."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--value", type=float, default=0.0)
    parser.add_argument("--add", type=Path)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--fail-without", type=Path)
    parser.add_argument("--data", type=Path, help="a folder; the number of its files is added")
    parser.add_argument("--runs", type=Path, help="a line is added per run")
    args = parser.parse_args()
    if args.runs:
        with args.runs.open("a") as file:
            file.write(f"{args.value} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
    if args.fail_without and not args.fail_without.exists():
        sys.exit(f"error: {args.fail_without.name} is missing")
    print("working", flush=True)
    (args.out / "draft").write_text("saved on the way")
    time.sleep(args.sleep)
    added = json.loads(args.add.read_text())["value"] if args.add else 0.0
    if args.data:
        added += len(list(args.data.iterdir()))
    (args.out / "part").mkdir(exist_ok=True)
    (args.out / "part" / "number.json").write_text(json.dumps({"value": args.value + added}))
    record = args.out / "record.json"
    record.with_suffix(".part").write_text(json.dumps({"value": args.value + added}))
    record.with_suffix(".part").rename(record)


if __name__ == "__main__":
    main()
