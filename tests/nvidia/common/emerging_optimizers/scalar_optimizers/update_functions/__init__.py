from emerging_optimizers.scalar_optimizers.update_functions.adam import calculate_adam_update

__all__ = ["calculate_adam_update"]
