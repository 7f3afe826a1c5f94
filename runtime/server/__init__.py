"""The HTTP face: OpenAI's and SGLang's routes over :class:`runtime.worker.Worker`. Needs the extra ``serve``."""
