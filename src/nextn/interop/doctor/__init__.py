"""Find faults in a checkpoint's MTP modules, and say how to repair them.

examine(path)    headers, then the MTP tensors one at a time, give a `Diagnosis`: findings and a verdict
services(found)  whether each engine runs it, and the command
finding          what a finding is
stored           what is declared, and which tensor is in which place
invariants, values     each finding's invariant: on names, shapes and dtypes; on the values
fit              invariants of nextn's loader, on checkpoints whose settings it reads
"""

from nextn.interop.doctor.diagnosis import CONVENTIONS, Diagnosis
from nextn.interop.doctor.examination import examine
from nextn.interop.doctor.finding import SEVERITIES, Finding, Severity
from nextn.interop.doctor.service import Service, services

__all__ = ["CONVENTIONS", "SEVERITIES", "Diagnosis", "Finding", "Service", "Severity", "examine", "services"]
