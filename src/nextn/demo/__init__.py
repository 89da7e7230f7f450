"""The run of `nextn demo`: its recipe, and as many steps as fit the minutes."""

from nextn.demo.plan import DEMO_RECIPE, DemoPlan, delete_demo, plan_demo, require_demo, resume_demo

__all__ = ["DEMO_RECIPE", "DemoPlan", "delete_demo", "plan_demo", "require_demo", "resume_demo"]
