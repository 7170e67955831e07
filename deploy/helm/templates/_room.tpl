{{- /*
Replicas that find no room would wait for ever, without an error: what can't be is refused here.
Ray counts a pod's CPUs and GPUs by its limits, and rounds them up.
*/ -}}
{{- define "backpack.room" -}}
{{- $workers := .workers }}
{{- if gt (int $workers.min) (int $workers.max) }}
{{- fail (printf "inference.workers: min (%v) is more than max (%v)" $workers.min $workers.max) }}
{{- end }}
{{- $limits := $workers.resources.limits | default dict }}
{{- $cpu := toString ($limits.cpu | default 0) }}
{{- $cpus := hasSuffix "m" $cpu | ternary (divf (trimSuffix "m" $cpu | float64) 1000) (float64 $cpu) | ceil }}
{{- $gpus := 0.0 }}
{{- range $name, $count := $limits }}{{ if hasSuffix "gpu" $name }}{{ $gpus = float64 $count }}{{ end }}{{ end }}
{{- $each := .arguments }}
{{- $ranks := int $each.tensor_parallel }}
{{- $spread := eq ($each.placement | default "STRICT_PACK") "SPREAD" }}
{{- $rank := printf "cpus %v, gpus %v" $each.cpus $each.gpus }}
{{- if and (gt $ranks 1) (gt (float64 $each.gpus) 0.0) (lt (float64 $each.gpus) 1.0) }}
{{- fail (printf "inference.arguments: ranks (tensor_parallel) need a GPU each, or none; gpus is %v" $each.gpus) }}
{{- end }}
{{- if and (gt $ranks 1) (eq (float64 $each.gpus) 0.0) (eq (float64 $each.cpus) 0.0) }}
{{- fail "inference.arguments: cpus and gpus are 0; Ray places ranks (tensor_parallel) by what they need" }}
{{- end }}
{{- if and (eq $ranks 1) $spread }}
{{- fail "inference.arguments: placement is SPREAD; there are no ranks to spread (tensor_parallel is 1)" }}
{{- end }}
{{- /* Ranks that fit into a pod. */ -}}
{{- $fit := 1000000.0 }}
{{- if gt (float64 $each.cpus) 0.0 }}{{ $fit = divf $cpus $each.cpus | floor }}{{ end }}
{{- if gt (float64 $each.gpus) 0.0 }}{{ $fit = minf $fit (divf $gpus $each.gpus | floor) }}{{ end }}
{{- $together := $spread | ternary 1 $ranks }}
{{- if lt (float64 $fit) (float64 $together) }}
{{- $what := gt $ranks 1 | ternary (printf "%d ranks of a replica (arguments: %s each) don't" $together $rank) (printf "a replica (arguments: %s) doesn't" $rank) }}
{{- $else := and (gt $ranks 1) (not $spread) | ternary "; placement: SPREAD lets them be in several" "" }}
{{- fail (printf "inference: %s fit into a pod (workers.resources.limits: %v CPUs, %v GPUs)%s" $what $cpus $gpus $else) }}
{{- end }}
{{- $wanted := $each.count }}
{{- with $each.autoscaling }}
{{- $wanted = .max_replicas }}
{{- if gt (int .min_replicas) (int .max_replicas) }}
{{- fail (printf "inference.arguments.autoscaling: min_replicas (%v) is more than max_replicas (%v)" .min_replicas .max_replicas) }}
{{- end }}
{{- end }}
{{- $hold := divf $fit $ranks | floor }}
{{- $room := $spread | ternary (divf (mulf $fit $workers.max) $ranks | floor) (mulf $hold $workers.max) }}
{{- if gt (float64 $wanted) (float64 $room) }}
{{- $pods := $spread | ternary (printf "%v ranks each" $fit) (printf "%v each" $hold) }}
{{- fail (printf "inference: %v replicas%s don't fit into workers.max (%v) pods, which hold %s" $wanted (gt $ranks 1 | ternary (printf " of %d ranks" $ranks) "") $workers.max $pods) }}
{{- end }}
{{- end }}
