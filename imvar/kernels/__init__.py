"""Fast implementations of single operations: functions of tensors that know no model."""
