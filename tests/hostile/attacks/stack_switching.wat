;; Suspends itself with a continuation of its own. Refused.
(module (memory (export "memory") 1) (type $f (func)) (type $c (cont $f)) (func $g) (elem declare func $g)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (resume $c (cont.new $c (ref.func $g))) (i32.const 0)))
