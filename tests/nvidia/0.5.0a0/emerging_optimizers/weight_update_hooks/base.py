class WeightUpdateHook:
    pass
