"""Writes the Parquet files beside it with pyarrow 26.0.1: rows of the demo's tasks in the columns of the public
datasets, once in the hub's usual compression and once in zstd, one split in two parts."""
import json

import pyarrow as pa
import pyarrow.parquet as pq

def rows(task, count):
    return [json.loads(line) for line in open(f"../../../models/demo/tasks/{task}.jsonl")][:count]

arc = rows("arc_easy", 12)
columns = ["id", "question", "choices", "answerKey"]
table = pa.Table.from_pylist([{name: row.get(name, "") for name in columns} for row in arc])
pq.write_table(table.slice(0, 7), "arc-0.parquet", compression="snappy")
pq.write_table(table.slice(7), "arc-1.parquet", compression="snappy")

piqa = [{name: row[name] for name in ["goal", "sol1", "sol2", "label"]} for row in rows("piqa", 10)]
pq.write_table(pa.Table.from_pylist(piqa), "piqa.parquet", compression="zstd")
