"""Run by the Python of .venv-vllm, which has nothing of ours: vllm_worker.py JOBS.json ANSWERS.json.

JOBS: [{folder, max_model_len, prompts (lists of ids), max_tokens, text, messages, adapters}]. adapters: the LoRA folder of each prompt, []
for the base model. ANSWERS: for each job greedy `ids` and their
`logprobs`, what vLLM's tokenizer makes of the text (`text_ids`) and of the messages (`chat_ids`, where the folder has a chat template).
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: several can follow one another
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def answer(job):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folders = sorted(set(job["adapters"]))
    lora = {"enable_lora": True, "max_loras": len(folders)} if folders else {}
    llm = LLM(job["folder"], dtype="float32", max_model_len=job["max_model_len"], enforce_eager=True, max_num_seqs=4, seed=0, **lora)
    asked = [LoRARequest(folder, folders.index(folder) + 1, folder) for folder in job["adapters"]]
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], logprobs=1)
    found = [
        out.outputs[0] for out in llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params, lora_request=asked or None)
    ]
    tokenizer = llm.get_tokenizer()
    chat = tokenizer.chat_template and tokenizer.apply_chat_template(job["messages"], add_generation_prompt=True, return_dict=False)
    return {
        "ids": [list(out.token_ids) for out in found],
        "logprobs": [[step[i].logprob for i, step in zip(out.token_ids, out.logprobs, strict=True)] for out in found],
        "text_ids": tokenizer.encode(job["text"]),
        "chat_ids": chat,
    }


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(job) for job in jobs]))
