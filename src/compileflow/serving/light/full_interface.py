"""What an error of the light pipelines says about the full interface of Hugging Face."""

FULL_INTERFACE = "CompiledPipeline has the interface of transformers; install it: pip install 'compileflow[hf]'"
