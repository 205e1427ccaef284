"""From human rankings to a score. Import the modules: `from reward_models import stage, train`."""
