"""The plugin that SGLang finds by its entry point, in every process of an engine."""

from tq_connectors.sglang.attention_registration import add_backend
from tq_connectors.sglang.hooks import hooks_of_release


def register() -> None:
    """Register the backend and the hooks; SGLang applies those when this has returned.

    An exception here is logged by SGLang, which then goes on without the plugin: `--kv-cache-dtype tq4` is
    an unknown dtype then. Hooks that SGLang could not apply are found by `installed.require_hooks`.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_backend()
    for hook in hooks_of_release():
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind))
