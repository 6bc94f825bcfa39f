"""Search of a trained supernet for one device: distances to the teacher, NSGA-II, fronts."""
