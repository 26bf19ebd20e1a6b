"""OR-tools CP-SAT in a process of its own, for `solver_baselines.py`: arrays on stdin, JSON on stdout."""

import io
import json
import sys
import time

import numpy as np
from ortools.sat.python import cp_model

arrays = np.load(io.BytesIO(sys.stdin.buffer.read()))
started = time.process_time()
loss = arrays["loss"]
G, S = loss.shape
model = cp_model.CpModel()
x = [[model.new_bool_var("") for _ in range(S)] for _ in range(G)]
flat = [v for row in x for v in row]
for row in x:
    model.add_exactly_one(row)
for cost, limit in zip(arrays["cost"], arrays["limit"], strict=True):
    spent = cp_model.LinearExpr.weighted_sum(flat, np.ceil(cost).astype(int).ravel().tolist())
    model.add(spent <= int(limit))
# It takes whole numbers only.
whole = np.round(loss / loss.max(1).sum() * 1e15).astype(int)
model.minimize(cp_model.LinearExpr.weighted_sum(flat, whole.ravel().tolist()))
solver = cp_model.CpSolver()
solver.parameters.max_time_in_seconds = float(arrays["seconds"])
solver.parameters.num_workers = 1
status = solver.solve(model)
found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
pick = np.array([[solver.value(v) for v in row] for row in x]).argmax(1).tolist() if found else None
spent_seconds = time.process_time() - started
print(json.dumps({"pick": pick, "proven": status == cp_model.OPTIMAL, "cpu": spent_seconds}))
