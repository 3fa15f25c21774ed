"""From a name, a configuration or a checkpoint to a module and its weights."""
