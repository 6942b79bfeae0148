"""The models behind the scorer. One is loaded by each Ray worker; nothing here knows HTTP, Ray or the method.

A language model scores references after the prefixes of rollouts:

    base                what a request holds, what an engine answers, and which requests are refused
    token_paths         a request as token paths, one for each (boundary, reference), and its scores from theirs
    prefix_tree         the paths packed so that no shared prefix is there twice
    transformers_engine the packed tree through a transformers model
    vllm_engine         the paths through vLLM, in the waves of vllm_waves, with what vllm_logprobs asks and reads
    lora, loading       adapters, and what loading has in common

An NLI model clusters answers and scores evidence:

    nli                 what is asked, clusters in rounds, and words instead of a model
    nli_model           a transformers sequence classifier
"""
