"""Fast implementations of single operations: functions of tensors, independent of any model."""
