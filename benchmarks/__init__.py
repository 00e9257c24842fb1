"""Measurements of this library beside what people would use instead, each checked before its time counts."""
