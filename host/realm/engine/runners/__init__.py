"""Runners: a model on a device, with its KV pages (:class:`realm.engine.batch.Runner`)."""
