"""vLLM on compressed pages; its entry point is `tq_connectors.vllm.plugin`."""
