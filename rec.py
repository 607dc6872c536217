import dspy
from tests.support.spans import Recorder
r=Recorder().instrument()
class R(dspy.Module):
    def forward(s,n):
        try:
            if n: s(n=n-1)
        except ValueError: pass
        raise ValueError("own")
class T(dspy.Module):
    def forward(s,n):
        if n: return s(n=n-1)
        raise ValueError("deep")
import asyncio
class A(dspy.Module):
    async def aforward(s,n):
        if n: return await asyncio.gather(s.acall(n=n-1))
        raise ValueError("deep")
for P in R,T:
    r.clear()
    try: P()(n=4)
    except ValueError: pass
    print(P.__name__,[any(e.name=="exception" for e in s.events) for s in r.spans])
r.clear()
try: asyncio.run(A().acall(n=4))
except ValueError: pass
print("A",[any(e.name=="exception" for e in s.events) for s in r.spans])
t=dspy.Tool(lambda x: 1/0, name="t")
class M(dspy.Module):
    def forward(s): return t(x=1)
r.clear()
def metric(e,p,t=None): return 1
try: dspy.Parallel(num_threads=2,max_errors=1,disable_progress_bar=True)([(M(),{})])
except Exception as e: print(repr(e))
print([(s.name,s.status.status_code.name,[e.name for e in s.events]) for s in r.spans])
r.clear()
try: dspy.Evaluate(devset=[dspy.Example(x=1).with_inputs()],metric=metric,num_threads=1,display_progress=False,max_errors=1)(M())
except Exception as e: print(repr(e)[:100])
print([(s.name,s.status.status_code.name,[e.name for e in s.events]) for s in r.spans])
