"""Downstream tasks, installed as `sista_tasks`; each is a plug-in of the `sista.tasks` entry points."""
