"""lm-evaluation-harness: scores a task and some texts. Arguments: URL, model, tokenizer, task folder, output file.

Writes {"accuracy": …, "loglikelihoods": [...]} for the pairs in the task folder's pairs.json.
"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

url, model, tokenizer, tasks, output = sys.argv[1:]
lm = LocalCompletionsAPI(
    base_url=f"{url}/v1/completions", model=model, tokenizer=tokenizer, tokenizer_backend="huggingface"
)
manager = TaskManager(include_path=tasks, include_defaults=False)
results = lm_eval.simple_evaluate(model=lm, tasks=["colours"], task_manager=manager, bootstrap_iters=0)
pairs = json.loads(Path(tasks, "pairs.json").read_text())
requests = [Instance("loglikelihood", {}, tuple(pair), index) for index, pair in enumerate(pairs)]
scores = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
accuracy = results["results"]["colours"]["acc,none"]
Path(output).write_text(json.dumps({"accuracy": accuracy, "loglikelihoods": scores}))
print("ok")
