"""Questions from documents, without a model: parsing, the concept graph and its walks, retrieval, duplicates, diversity (SynthLLM)."""
